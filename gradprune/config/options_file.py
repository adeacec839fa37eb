"""`--config FILE`: reading a command's options from a YAML file, or from the `run.json` of an earlier run."""

import logging
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from gradprune.config.prune_config import OPTIONS
from gradprune.errors import ConfigError, one_line

logger = logging.getLogger(__name__)

_NOTHING = ("null", "~", "")


def options_from_file(path: str, taken: Collection[str], command: str, *, evaluates: bool = False) -> dict[str, str]:
    """Read options from a file; return their values by name, as the text that the command line would have.

    Args:
        path: a YAML file that maps names to values, where a list stands for several comma-separated values and null
            for an unset option; or a `run.json`, whose options that this command does not take are ignored.
        taken: the names of the options that the command takes.
        command: the command's name, for messages.
        evaluates: whether the command's dataset is text to measure on, so that it is the eval_dataset of a run.

    Raises:
        ConfigError: the file cannot be read, is not a mapping, or names an option that the command does not take.
    """
    given = _mapping(path)
    recorded = given.get("config")
    options = recorded if isinstance(recorded, dict) else given
    if options is recorded and evaluates:
        options = recorded = _evaluating(recorded, path)
    found: dict[str, str] = {}
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name not in taken:
            if options is recorded and name in OPTIONS:
                continue
            raise ConfigError(
                f"config: '{key}' in '{path}' is not an option of gradprune {command}; the nearest is "
                f"{_nearest(name, taken)}"
            )
        if isinstance(value, dict) or (isinstance(value, list) and not all(isinstance(each, str) for each in value)):
            raise ConfigError(f"config: '{key}' in '{path}' is neither a value nor a list of values")
        text = ",".join(value) if isinstance(value, list) else value
        if text not in _NOTHING:
            found[name] = text
    return found


def _evaluating(recorded: dict[Any, Any], path: str) -> dict[Any, Any]:
    """Return a run's recorded options for a command that measures, whose dataset is the run's eval_dataset."""
    if (text := recorded.get("eval_dataset")) not in (None, *_NOTHING):
        return {**recorded, "dataset": text}
    if recorded.get("dataset") not in (None, *_NOTHING):
        logger.warning(
            "config: '%s' has no eval_dataset; unless --dataset names another text, perplexity is measured on the "
            "dataset that the run calibrated on",
            path,
        )
    return recorded


def _mapping(path: str) -> dict[Any, Any]:
    try:
        # Keep every value as text, so that it means the same as on the command line. JSON is read as YAML, too.
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"config: '{path}' cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config: '{path}' is not a mapping from options to values")
    return content


def _nearest(name: str, taken: Collection[str]) -> str:
    return get_close_matches(name, taken, n=1, cutoff=0.0)[0]
