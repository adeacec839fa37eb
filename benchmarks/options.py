"""The options that every benchmark has."""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.results import FOLDER


def parser(description: str | None) -> ArgumentParser:
    """A command line with the common options; each benchmark adds its own."""
    made = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    made.add_argument("--toy", action="store_true", help="the smallest cases, to check the benchmark itself")
    made.add_argument("--seconds", type=float, default=None, help="skip, with a record, what cannot end in this time")
    made.add_argument("--output", type=Path, default=FOLDER, help="folder of the results, which are appended")
    return made


def parse(made: ArgumentParser, arguments: Sequence[str] | None) -> Namespace:
    """The options; a device that is not there is refused."""
    options = made.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: PyTorch finds no CUDA device here")
    return options


def listed(convert: Callable[[str], object]) -> Callable[[str], list[object]]:
    """A type of option: values separated by commas."""
    return lambda text: [convert(part) for part in text.split(",")]
