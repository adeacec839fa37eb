"""Writing a configuration as a shell command."""

import shlex
from dataclasses import replace

from gradprune.config.prune_config import OPTIONS, PruneConfig


def command_line(config: PruneConfig) -> str:
    """Return the `gradprune prune` command of a configuration, with every option that differs from its default."""
    words = ["gradprune", "prune"]
    for name, option in OPTIONS.items():
        value = getattr(config, name)
        if value == option.default or option.library_only:
            continue
        words += [f"--{name}"] if value is True else [f"--no_{name}"] if value is False else [f"--{name}", str(value)]
    return shlex.join(words)


def rerun_command(config: PruneConfig) -> str:
    """Return the command that repeats a run and writes to a new results folder, so that the first results remain."""
    if config.output_name is not None:
        config = replace(config, output_name=f"{config.output_name}-again", resume=False)
    return command_line(config)
