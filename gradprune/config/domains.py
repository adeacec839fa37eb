"""Domains: which values of its type an option accepts, and the messages with which it refuses the others."""

import json
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Sizes and counts end up in C++ ints and in tensor indices, seeds in 64-bit generators.
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1


@dataclass(frozen=True)
class Domain:
    """The set of values that an option accepts, a subset of its type.

    words: a phrase that describes the values, such as "a number between 0 and 1"; empty if all of the type's are valid.
    fault: returns what is wrong with a value, worded to follow "name: ", or None if the value is valid.
    """

    words: str
    fault: Callable[[Any], str | None]


ANYTHING = Domain("", lambda value: None)


def at_least(least: int, most: int = INT32_MAX) -> Domain:
    """Whole numbers from `least` to `most`; messages mention `most` only if a value exceeds it."""
    words = f"a whole number of at least {least}"

    def fault(value: int) -> str | None:
        if value > most:
            return f"{value} is too large; at most {most} is possible"
        return None if value >= least else f"{value} is not {words}"

    return Domain(words, fault)


def numbers(words: str, contains: Callable[[float], bool]) -> Domain:
    """The numbers for which `contains` is true; it must be false for NaN."""
    return Domain(f"a number {words}", lambda value: None if contains(value) else f"{value} is not {words}")


def finite(words: str, contains: Callable[[float], bool]) -> Domain:
    """The finite numbers for which `contains` is true."""
    phrase = f"a finite number {words}"
    return Domain(
        phrase, lambda value: None if math.isfinite(value) and contains(value) else f"{value} is not {phrase}"
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_COUNT = re.compile(r"(\d+(?:\.\d+)?) ?([KMBT]?)", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?B)?", re.IGNORECASE)


def bytes_of(size: str) -> int:
    """Return the number of bytes of a size such as "4GiB", "512 MiB", "1.5G" or "80GB".

    KB, MB, GB and TB are powers of 1000; K and KiB, M and MiB, and so on, are powers of 1024.

    Raises:
        ValueError: `size` is not a size.
    """
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise ValueError(size)
    number, unit, suffix = match.groups()
    power = 1000 ** "_KMGT".index(unit.upper()) if unit and (suffix or "").upper() == "B" else _UNITS[unit.upper()]
    return int(float(number) * power)


def memory_size() -> Domain:
    """Text that `bytes_of` reads as at least one byte."""
    words = "a size such as 4GiB or 512MiB"

    def fault(value: str) -> str | None:
        try:
            return None if bytes_of(value) > 0 else f"{value!r} is less than one byte; give {words}"
        except ValueError:
            return f"{value!r} is not {words}"

    return Domain(words, fault)


def count_of(number: str) -> int:
    """Return the whole number written in full or as "350M" or "1.5B" (K, M, B and T are powers of 1000).

    Raises:
        ValueError: `number` is not a number of at least 1.
    """
    match = _COUNT.fullmatch(number.strip())
    if match is None or (found := int(float(match[1]) * 1000 ** "_KMBT".index(match[2].upper() or "_"))) < 1:
        raise ValueError(number)
    return found


def count() -> Domain:
    """Text that `count_of` reads."""
    words = "a number such as 350M or 1.5B"

    def fault(value: str) -> str | None:
        try:
            count_of(value)
        except ValueError:
            return f"{value!r} is not {words}"
        return None

    return Domain(words, fault)


def names_among(names: tuple[str, ...]) -> Domain:
    """Text of one or several of `names`, separated by commas, without duplicates."""
    words = f"one or several of {', '.join(names)}, separated by commas"

    def fault(value: str) -> str | None:
        given = value.split(",")
        unknown = [name for name in given if name not in names]
        if unknown:
            return f"{unknown[0]!r} is unknown; give {words}"
        return f"{value!r} names one of them twice" if len(set(given)) < len(given) else None

    return Domain(words, fault)


DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def device_map_of(value: str) -> str | dict[str, str | int]:
    """Return what transformers accepts as `device_map`: one of `DEVICE_MAPS`, or JSON as a dict of devices by module.

    Raises:
        ValueError: `value` is neither.
    """
    if value in DEVICE_MAPS:
        return value
    found = json.loads(value)
    places = found.values() if isinstance(found, dict) else ()
    # "disk" is refused, because layers that do not fit in memory are streamed instead.
    if not places or not all(type(place) in (str, int) and place != "disk" for place in places):
        raise ValueError(value)
    return dict(found)


def device_map() -> Domain:
    """Text that `device_map_of` reads."""
    words = f'one of {", ".join(DEVICE_MAPS)}, or JSON such as {{"model.embed_tokens": 0, "model.layers.0": 1}}'

    def fault(value: str) -> str | None:
        try:
            device_map_of(value)
        except (ValueError, RecursionError):
            return f"{value!r} is not {words}"
        return None

    return Domain(words, fault)


def path(what: str) -> Domain:
    """Text that can be a path or the name of something to load; `what` is a phrase that describes it."""

    def fault(value: str) -> str | None:
        if not value:
            return f"'' is empty; give {what}, or leave the option out"
        return f"{value!r} contains a NUL character" if "\0" in value else None

    return Domain(what, fault)


def folder_name() -> Domain:
    """Text that can be the name of a single folder."""

    def fault(value: str) -> str | None:
        if value in ("", ".", "..") or Path(value).name != value:
            return f"{value!r} is not a plain folder name; put its parent in output_dir"
        if value.startswith("-"):
            return f"{value!r} looks like an option; give a name that does not begin with '-'"
        # Cc are control characters; Cs, surrogates, stand for bytes of the command line that are not UTF-8.
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
            return f"{value!r} contains control characters; use letters, digits, '.', '_' and '-'"
        return None

    return Domain("a plain folder name", fault)
