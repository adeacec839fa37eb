"""Configurations as shell commands."""

import shlex

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
