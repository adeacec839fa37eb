"""Command-line options that all benchmarks share."""

import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from benchmarks.results import FOLDER


def parser(description: str | None) -> ArgumentParser:
    """Return a command-line parser with the common options, to which each benchmark adds its own."""
    made = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    made.add_argument("--toy", action="store_true", help="tiny cases, to test the benchmark itself")
    made.add_argument("--seconds", type=float, default=None, help="time limit; the rest is recorded as skipped")
    made.add_argument(
        "--until", type=float, default=None, help="the time limit as a value of time.monotonic(), instead of --seconds"
    )
    made.add_argument("--output", type=Path, default=FOLDER, help="folder to append the results to")
    return made


def parse(made: ArgumentParser, arguments: Sequence[str] | None) -> Namespace:
    """Parse the options, converting --until to --seconds; exit with an error for --device cuda without a GPU."""
    options = made.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: PyTorch finds no CUDA device here")
    if options.until is not None:
        options.seconds = options.until - time.monotonic()
    return options


def listed(convert: Callable[[str], object], of: Collection[str] = ()) -> Callable[[str], list[object]]:
    """Return an argparse type for values separated by commas; of: the values that are allowed, all if empty."""

    def parts(text: str) -> list[object]:
        try:
            found = [convert(part) for part in text.split(",")]
        except ValueError as error:
            raise ArgumentTypeError(f"'{text}' is not a list of numbers separated by commas") from error
        if unknown := [value for value in found if of and value not in of]:
            raise ArgumentTypeError(f"'{unknown[0]}' is none of {', '.join(of)}")
        return found

    return parts


def folder_of(pattern: str) -> Callable[[str], Path]:
    """Return an argparse type for a folder that contains a file matching `pattern`."""

    def folder(text: str) -> Path:
        if not any(Path(text).glob(pattern)):
            raise ArgumentTypeError(f"'{text}' is not a folder with {pattern} in it")
        return Path(text)

    return folder
