"""Several datasets in one: their names and weights, and one stream of tokens with these shares."""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from gradprune.data.windows import HELD_OUT


def split_names(dataset: str) -> list[tuple[str, float]]:
    """The datasets that `dataset` names, each with its weight: "a.txt:0.7,b.jsonl:0.3"; a weight left out is 1.

    Without a comma, and where a file has that very name, it names one dataset.

    Raises:
        ValueError: a weight is not a finite number above 0, or a name is empty; says which.
    """
    if "," not in dataset or os.path.isfile(dataset):  # noqa: PTH113 - Path's raises where a name is too long
        return [(dataset, 1.0)]
    return [_name_and_weight(part.strip()) for part in dataset.split(",")]


def mixed(streams: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """One stream in which each dataset has its share of the tokens.

    Each dataset gives its first tokens, as many as its share allows before the first of them runs out. The last
    tenth of each one's tokens comes at the end of the stream, so that what is held out there is of all of them.

    Args:
        streams: [tokens] int64 each, not empty.
        weights: of each, above 0; they need not add up to 1.

    Returns:
        [tokens] int64.
    """
    total = min(len(stream) / weight for stream, weight in zip(streams, weights, strict=True))
    parts = [stream[: max(1, int(total * weight))] for stream, weight in zip(streams, weights, strict=True)]
    ends = [len(part) - int(len(part) * HELD_OUT) for part in parts]
    return torch.cat(
        [part[:end] for part, end in zip(parts, ends, strict=True)]
        + [part[end:] for part, end in zip(parts, ends, strict=True)]
    )


def _name_and_weight(part: str) -> tuple[str, float]:
    name, _, weight = part.rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        name, value = part, 1.0
    if not name:
        raise ValueError(f"'{part}' names no dataset; several are given as a.txt:0.7,b.jsonl:0.3")
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"the weight of '{name}', {weight}, is not a finite number above 0")
    return name, value
