"""Whether importance vectors are right: against the reference in fp64, with the error that fp32 sums may have."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from gradprune.ops.vectors import ImportanceVectors

_FP32_SUM = 1e-5


def vectors_check(
    reference: Callable[..., ImportanceVectors], gradient_epsilon: float = 0.0
) -> Callable[[Any, tuple[Any, ...]], str | None]:
    """A provider's check of `ImportanceVectors`.

    Args:
        reference: the op's reference; it is given the inputs in fp64.
        gradient_epsilon: relative rounding of the gradient's elements, where the op forms it in low precision.
    """

    expected: list[ImportanceVectors] = []

    def check(found: ImportanceVectors, inputs: tuple[Any, ...]) -> str | None:
        # A case's providers are all checked on the same inputs: once is enough.
        if not expected:
            expected.append(reference(*(value.double() for value in inputs)))
        return vectors_fault(found, expected[0], _FP32_SUM + gradient_epsilon)

    return check


def vectors_fault(found: ImportanceVectors, expected: ImportanceVectors, tolerance: float) -> str | None:
    """The first vector that differs, or None.

    A sum's error is measured against the sum of its terms' magnitudes (|w g| for w g), element by element; where that
    is nearly nothing, against the vector's mean. |g|'s extremes against the largest.
    """
    for spec in fields(ImportanceVectors):
        want, have = getattr(expected, spec.name).double(), getattr(found, spec.name).double()
        if have.shape != want.shape:
            return f"{spec.name} has shape {tuple(have.shape)}, not {tuple(want.shape)}"
        error = ((have - want).abs() / _scale(spec.name, expected)).max().item() if want.numel() else 0.0
        # Squares have twice the relative error. Written so that NaN fails.
        if not error <= 2.0 * tolerance:
            return f"{spec.name} is off by {error:.1e} of its scale; {2.0 * tolerance:.1e} is allowed"
    return None


def _scale(name: str, expected: ImportanceVectors) -> Tensor:
    if name == "statistics":
        sum_abs, sum_square, largest, _, _ = expected.statistics.double()
        return torch.stack([sum_abs, sum_square, largest, largest, torch.ones_like(largest)])
    terms: Tensor = getattr(expected, name.replace("signed", "abs")).double()
    return terms + terms.mean()
