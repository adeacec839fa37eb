"""The documentation's page of all options. `python -m gradprune.config.table > docs/options.md` regenerates it."""

from gradprune.config.option import Option, Options, options_of
from gradprune.config.parts import PARTS
from gradprune.config.recovery_config import RecoveryConfig

_HEAD = """# Options

Every option of `gradprune prune`, grouped by the stage that uses it. On the command line it is `--name value`, or
`--name` and `--no_name` if its values are True and False; `_` may be written as `-`. In a program it is
`PruneConfig(name=value)`. A default of `-` means unset. The other commands take some of these options;
`gradprune COMMAND --help` lists them.
"""

_RECOVERY = """# Options of `gradprune recover`

Besides the options below, it takes these of `gradprune prune`: `device`, `dtype`, `trust_remote_code`, `dataset`,
`eval_dataset`, `eval_samples`, `output_dir`, `output_name` and `overwrite`.
"""


def options_page() -> str:
    """Return the content of `docs/options.md`."""
    sections = [_HEAD, *(_section(part) for part in PARTS), _RECOVERY, _section(RecoveryConfig)]
    return "\n".join(sections)


def _section(part: type[Options]) -> str:
    options = list(options_of(part).values())
    rows = "\n".join(map(_row, options))
    return f"## {options[0].stage}\n\n| option | values | default | meaning |\n|---|---|---|---|\n{rows}\n"


def _row(option: Option) -> str:
    default = "-" if option.default is None else f"`{option.default}`"
    meaning = option.help
    if option.library_only:
        meaning += " Only in a program."
    return f"| `{option.name}` | {option.values} | {default} | {meaning} |"


if __name__ == "__main__":
    print(options_page(), end="")
