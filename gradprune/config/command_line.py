"""Configurations as shell commands."""

import shlex
from dataclasses import replace

from gradprune.config.prune_config import OPTIONS, PruneConfig


def again(config: PruneConfig) -> PruneConfig:
    """`config` with a results folder of its own, so that its command can run as it stands beside the results."""
    return (
        config
        if config.output_name is None
        else replace(config, output_name=f"{config.output_name}-again", resume=False)
    )


def command_line(config: PruneConfig) -> str:
    """The exact `gradprune prune` command of a configuration: every option that is not at its default."""
    words = ["gradprune", "prune"]
    for name, option in OPTIONS.items():
        value = getattr(config, name)
        if value == option.default or option.library_only:
            continue
        words += [f"--{name}"] if value is True else [f"--no_{name}"] if value is False else [f"--{name}", str(value)]
    return shlex.join(words)
