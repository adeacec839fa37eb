"""Check importance vectors against the reference in fp64, with the error that fp32 sums may have."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradprune.ops.vectors import GradientStatistics, ImportanceVectors

_FP32_SUM = 1e-5


def vectors_check(
    reference: Callable[..., ImportanceVectors], gradient_epsilon: float = 0.0
) -> Callable[[Any, tuple[Any, ...]], str | None]:
    """A provider's check of `ImportanceVectors`.

    Args:
        reference: the op's reference; it is called with the inputs in fp64.
        gradient_epsilon: relative rounding error of the gradient's elements, if the op forms it in low precision.
    """

    expected: list[ImportanceVectors] = []

    def check(found: ImportanceVectors, inputs: tuple[Any, ...]) -> str | None:
        # All providers of a case are checked on the same inputs, so the reference is computed once.
        if not expected:
            expected.append(reference(*(value.double() for value in inputs)))
        return vectors_fault(found, expected[0], _FP32_SUM + gradient_epsilon)

    return check


def vectors_fault(found: ImportanceVectors, expected: ImportanceVectors, tolerance: float) -> str | None:
    """What is wrong with the first vector that differs, or None.

    The error of a sum is relative to the sum itself plus the vector's mean, because some sums are nearly 0; that of the
    smallest |g| is relative to the largest.
    """
    for name in ("row_abs", "row_square", "column_abs", "column_square"):
        want, have = getattr(expected, name), getattr(found, name)
        if (have is None) != (want is None):
            return f"{name} is {'missing' if have is None else 'there'}, and must not be"
        if want is not None and (fault := _fault(name, have, want, want + want.mean(), tolerance)) is not None:
            return fault
    want, statistics = expected.statistics.pack(), expected.statistics
    scale = GradientStatistics(
        statistics.sum_abs, statistics.sum_square, statistics.max_abs, statistics.max_abs, torch.ones_like(want[0])
    )
    return _fault("statistics", found.statistics.pack(), want, scale.pack(), tolerance)


def _fault(name: str, have: Tensor, want: Tensor, scale: Tensor, tolerance: float) -> str | None:
    if have.shape != want.shape:
        return f"{name} has shape {tuple(have.shape)}, not {tuple(want.shape)}"
    error = ((have.double() - want.double()).abs() / scale.double()).max().item() if want.numel() else 0.0
    # Squares have twice the relative error. Written so that NaN fails.
    if error <= 2.0 * tolerance:
        return None
    return f"{name} is off by {error:.1e} of its scale; {2.0 * tolerance:.1e} is allowed"
