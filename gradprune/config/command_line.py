"""Configurations as shell commands."""

import shlex
from dataclasses import replace

from gradprune.config.prune_config import OPTIONS, PruneConfig


def command_line(config: PruneConfig) -> str:
    """The exact `gradprune prune` command of a configuration: every option that is not at its default."""
    words = ["gradprune", "prune"]
    for name, option in OPTIONS.items():
        value = getattr(config, name)
        if value == option.default or option.library_only:
            continue
        words += [f"--{name}"] if value is True else [f"--no_{name}"] if value is False else [f"--{name}", str(value)]
    return shlex.join(words)


def rerun_command(config: PruneConfig) -> str:
    """The command that repeats a run into a results folder of its own, so that it can run beside the first results."""
    if config.output_name is not None:
        config = replace(config, output_name=f"{config.output_name}-again", resume=False)
    return command_line(config)
