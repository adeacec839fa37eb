"""`option`, which declares an option of a run in one line, and `Options`, the base class of groups of options.

A group is a frozen dataclass derived from `Options`:

    @dataclass(frozen=True)
    class Data(Options):
        seq_len: int = option(128, "Tokens per sample.", at_least(2))

The command line, the validation, `run.json` and the documentation are derived from the field's name, type, default,
help and domain. A type is str, int, float, bool or a `Literal`, and may be `| None`.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from gradprune.config.domains import ANYTHING, Domain
from gradprune.errors import ConfigError

_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Option:
    """The properties of an option.

    type: the annotated type. kind: the plain type of its values, which is bool, int, float or str.
    choices: the values of a `Literal`, else empty. optional: whether None is a valid value.
    stage: the title of the group that it belongs to.
    library_only: whether it exists only in programs and not on the command line.
    """

    name: str
    type: Any
    kind: type
    choices: tuple[str, ...]
    optional: bool
    default: Any
    help: str
    domain: Domain
    stage: str
    library_only: bool

    @property
    def values(self) -> str:
        """The valid values, in words."""
        return ", ".join(self.choices) or self.domain.words or _WORDS[self.kind]

    def accepted(self, value: Any) -> Any:
        """Return `value` as the plain bool, int, float or str that is stored; None only for an optional option.

        NumPy's numbers, whole numbers for a float, and `Path`s for text are accepted, too.

        Raises:
            ConfigError: `value` is of another type, or outside the domain.
        """
        if value is None and self.optional:
            return None
        if self.choices:
            if not isinstance(value, str) or value not in self.choices:
                raise ConfigError(f"{self.name}: {_shown(value)} is unknown; choose one of {self.values}")
            return str(value)
        plain = _plain(value, self.kind)
        if plain is None:
            raise ConfigError(f"{self.name}: {_shown(value)} is not {self.values}")
        fault = self.domain.fault(plain)
        if fault is not None:
            raise ConfigError(f"{self.name}: {fault}")
        return plain


def option(default: Any, help: str, domain: Domain = ANYTHING, *, library_only: bool = False) -> Any:
    """Return a dataclass field that is an option; see `Option`."""
    known = {"help": help, "domain": domain, "library_only": library_only}
    return dataclasses.field(default=default, metadata=known)


@dataclass(frozen=True)
class Options:
    """Base class of the groups of options; it checks every value and converts it to its plain type."""

    def __post_init__(self) -> None:
        """Reject every value outside its domain, and values that contradict each other.

        Raises:
            ConfigError: a value is rejected; the message names the option, its value and what would be right.
        """
        for name, known in options_of(type(self)).items():
            object.__setattr__(self, name, known.accepted(getattr(self, name)))
        self.decide()
        self.check_together()

    def decide(self) -> None:
        """Set unset options that depend on others, using `object.__setattr__`; an override must call this method."""

    def check_together(self) -> None:
        """Raise ConfigError if values contradict each other; an override must call this method first."""


def options_of(group: type[Options]) -> MappingProxyType[str, Option]:
    """Return the options of a group by name, in the order of its fields."""
    # Any, because mypy mistakes the `__hash__` of the group's instances for that of the class.
    hashable: Any = group
    return _options_of(hashable)


@cache
def _options_of(group: type[Options]) -> MappingProxyType[str, Option]:
    types = get_type_hints(group)
    made = (_option(field, types[field.name], _stage(group, field.name)) for field in dataclasses.fields(group))
    return MappingProxyType({option.name: option for option in made})


def _option(field: "dataclasses.Field[Any]", annotated: Any, stage: str) -> Option:
    members = [member for member in get_args(annotated) if member is not type(None)]
    optional = type(None) in get_args(annotated)
    inner = members[0] if optional else annotated
    choices = get_args(inner) if get_origin(inner) is Literal else ()
    kind = str if choices else cast(type, inner)
    return Option(field.name, annotated, kind, choices, optional, field.default, stage=stage, **field.metadata)


def _stage(group: type[Options], name: str) -> str:
    """Return the title of the group that defines the option: the first line of its docstring."""
    home = next(base for base in group.__mro__ if name in vars(base).get("__annotations__", ()))
    return (home.__doc__ or home.__name__).splitlines()[0].rstrip(".")


def _plain(value: Any, kind: type) -> bool | int | float | str | None:
    """Return `value` as `kind`, or None if it is of another type."""
    if kind is str:
        return str(value) if isinstance(value, str | PurePath) else None
    if kind is bool or isinstance(value, bool):
        return value if isinstance(value, bool) and kind is bool else None
    if kind is int:
        return int(value) if isinstance(value, Integral) else None
    try:
        return float(value) if isinstance(value, Real) else None
    except OverflowError:
        return None


def _shown(value: Any) -> str:
    """Return the `repr` of a value on one line."""
    return " ".join(repr(value).split())
