"""cheapest_removals: the eager formula, whose ops are many and small, and our kernels; the floor is a copy.

A case is a round of a removal path of `obs`, which removes a quarter of its candidate channels one by one.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.op import Case, Op
from benchmarks.kernels.providers import copied, importance_backends
from benchmarks.timing import Provider
from gradprune.ops.removals import Removals, cheapest_removals_reference

# The candidates of a round in a model's MLP: a quarter of its channels, at most 512.
_CHANNELS = {"SmolLM2-135M mlp": 384, "Llama-3-8B mlp": 512}
_TOLERANCE = 1e-9


def _cases(_device: str, size: str) -> list[Case]:
    channels = {"toy": 24} if size == "toy" else _CHANNELS
    return [Case(label, ((count, count),), "fp64") for label, count in channels.items()]


def _inputs(case: Case, number: int, device: str) -> tuple[Tensor, Tensor]:
    channels = case.shapes[0][0]
    x, weight = (case.random((2 * channels, channels), 2 * number + half, device) for half in range(2))
    return torch.linalg.inv(x.T @ x / len(x)), weight.T @ weight


def _copy(inverse: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Copy both matrices."""
    gram.clone()
    return inverse.clone(), inverse


def _check(found: Removals, inputs: tuple[Any, ...]) -> str | None:
    expected = cheapest_removals_reference(*inputs, columns=1, count=len(found.costs))
    if not torch.equal(found.taken, expected.taken):
        return "other groups are removed"
    error = (found.costs / expected.costs - 1.0).abs().max().item()
    # Written so that NaN fails.
    return None if error <= _TOLERANCE else f"costs are off by {error:.1e}; {_TOLERANCE:.0e} is allowed"


def _providers(case: Case, device: str) -> list[Provider]:
    how = {"columns": 1, "count": case.shapes[0][0] // 4}
    eager = Provider("eager", partial(cheapest_removals_reference, **how), _check)
    ours = importance_backends(lambda ops: partial(ops.cheapest_removals, **how), _check, device)
    return [Provider("copy", _copy, copied, floor=True), eager, *ours]


def _bytes(case: Case) -> int:
    """Bytes of both matrices, each read once."""
    return 2 * case.elements * case.itemsize


def _flops(case: Case) -> int:
    """Operations that bring rows up to date: three multiply-adds for each pair of elements of s and d read back."""
    channels = case.shapes[0][0]
    return 3 * channels * (channels // 4) ** 2


OP = Op("cheapest_removals", _cases, _inputs, _providers, moved_bytes=_bytes, input_bytes=_bytes, flops=_flops)
