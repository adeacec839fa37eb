"""Typer commands whose parameters are made from options."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from gradprune.config.option import Option, Options, options_of
from gradprune.config.options_file import options_from_file
from gradprune.config.prune_config import OPTIONS
from gradprune.errors import ConfigError

# Lists of choices longer than this many characters are shown in the help text instead of beside the option's name.
_LONGEST_CHOICES = 45

# The parameter that names a file of options.
_CONFIG = "config"

Command = Callable[..., None]


class StagedCommand(TyperCommand):
    """A command whose `--help` groups the options by stage."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section per stage."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                stage = getattr(parameter, "rich_help_panel", None) or "Other"
                sections.setdefault(stage, []).append(record)
        for stage, records in sections.items():
            with formatter.section(stage):
                formatter.write_dl(records)


def takes(
    *wanted: type[Options] | str,
    defaults: Mapping[str, Any] | None = None,
    several: Mapping[str, str] | None = None,
    from_file: bool = False,
    evaluates: bool = False,
) -> Callable[[Command], Command]:
    """Return a decorator that gives a typer command options as parameters.

    The decorated function is called with the options' values, as a mapping by name, and with its own parameters as
    keyword arguments.

    Args:
        wanted: groups of options, or names of options.
        defaults: the command's defaults, by name of the option, where they differ from the option's.
        several: the options that accept several comma-separated numbers, and for each of them a sentence for the help
            that says what several are for. Such an option's value in the mapping is a list of numbers within its
            domain, without duplicates.
        from_file: whether `--config` names a file that may set any of the parameters, too.
        evaluates: whether the command's dataset is text to measure on; see `options_from_file`.
    """
    options: dict[str, Option] = {}
    for each in wanted:
        options |= {each: OPTIONS[each]} if isinstance(each, str) else options_of(each)
    options = {name: option for name, option in options.items() if not option.library_only}
    defaults, several = defaults or {}, several or {}

    def decorate(function: Command) -> Command:
        @wraps(function)
        def command(**given: Any) -> None:
            given.pop(_CONFIG, None)
            values = {name: given.pop(name) for name in options}
            values.update({name: _numbers(options[name], values[name]) for name in several})
            function(values, **given)

        made = [
            _parameter(option, defaults.get(name, option.default), several.get(name))
            for name, option in options.items()
        ]
        own = list(inspect.signature(function).parameters.values())[1:]
        own += [_config_parameter(evaluates=evaluates)] if from_file else []
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*made, *own)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _parameter(option: Option, default: Any, several: str | None) -> inspect.Parameter:
    """Return an option as a parameter of a typer command; `several`: its sentence in `takes`, None if it takes one."""
    long = len("|".join(option.choices)) > _LONGEST_CHOICES
    help = f"{option.help} {several}" if several else option.help
    info = typer.Option(
        help=f"{help} One of {', '.join(option.choices)}." if long else help,
        metavar="NAME" if long else None,
        rich_help_panel=option.stage,
    )
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=f"{default:g}" if several else default,
        annotation=Annotated[str if several else option.type, info],
    )


def _config_parameter(*, evaluates: bool) -> inspect.Parameter:
    def read(context: typer.Context, value: str | None) -> str | None:
        """Make the file's values the defaults of the command's other parameters, which are read after this one."""
        if value is not None:
            names = [str(parameter.name) for parameter in context.command.params]
            taken = [name for name in names if name not in (_CONFIG, "help")]
            context.default_map = options_from_file(value, taken, str(context.info_name), evaluates=evaluates)
        return value

    info = typer.Option(
        help="YAML file of options, or the run.json of an earlier run; options on the command line take precedence.",
        callback=read,
        is_eager=True,
    )
    return inspect.Parameter(
        _CONFIG, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, info]
    )


def _numbers(option: Option, text: str) -> list[Any]:
    """Parse a comma-separated list of numbers, dropping duplicates.

    Raises:
        ConfigError: an item is not a number, or is outside the option's domain.
    """
    try:
        found = dict.fromkeys(option.kind(number) for number in text.split(","))
    except ValueError:
        what = "a whole number" if option.kind is int else "a number"
        raise ConfigError(f"{option.name}: '{text}' is not {what}, nor several separated by commas") from None
    return [option.accepted(number) for number in found]
