"""Mixtures of datasets: parse their names and weights, and mix their tokens in these shares into one stream."""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from gradprune.data.windows import HELD_OUT


def split_names(dataset: str) -> list[tuple[str, float]]:
    """Split a value such as "a.txt:0.7,b.jsonl:0.3" into the datasets' names and weights; a missing weight is 1.

    A value without a comma, or one that is the name of an existing file, is the name of a single dataset.

    Raises:
        ValueError: a weight is not a finite number above 0, or a name is empty; the message says which.
    """
    if "," not in dataset or os.path.isfile(dataset):  # noqa: PTH113 - Path.is_file raises for names that are too long
        return [(dataset, 1.0)]
    return [_name_and_weight(part.strip()) for part in dataset.split(",")]


def mixed(streams: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Mix the tokens of several datasets into one stream, each with its share.

    The stream takes each dataset's first tokens and is as long as the shares allow before one of the datasets runs out.
    The last tenth of each dataset's part is at the end of the stream, so that the tokens held out there come from all
    datasets.

    Args:
        streams: the datasets' tokens, [tokens] int64 each, not empty.
        weights: weight of each dataset, above 0; they need not add up to 1.

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
