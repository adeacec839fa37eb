"""mask_gradient: the eager formula, the same under torch.compile, and our kernels; the floor copies the same bytes."""

from typing import Any

from torch import Tensor

from benchmarks.kernels.cases import token_counts
from benchmarks.kernels.op import Case, Op
from benchmarks.kernels.providers import compiled, copied, importance_backends
from benchmarks.timing import Provider
from gradprune.ops.reference import mask_gradient_reference
from gradprune.ops.vectors import MaskGradient

# The largest error of an fp32 sum over tokens, relative to the sum of its terms' magnitudes.
_TOLERANCE = 2e-5


def _inputs(case: Case, number: int, device: str) -> tuple[Tensor, Tensor]:
    shape = (case.samples, case.tokens, case.shapes[0][1])
    return case.random(shape, 2 * number, device), case.random(shape, 2 * number + 1, device)


def _copy(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Copy x to dx, which moves as many bytes as reading both."""
    return dx.copy_(x), x


def _check(found: MaskGradient, inputs: tuple[Any, ...]) -> str | None:
    x, dx = (tensor.double() for tensor in inputs)
    expected = mask_gradient_reference(x, dx)
    scales = ((x * dx).abs().sum(1), expected.input_square)
    for name, have, want, scale in zip(found._fields, found, expected, scales, strict=True):
        error = ((have.double() - want).abs() / scale).max().item()
        # Written so that NaN fails.
        if not error <= _TOLERANCE:
            return f"{name} is off by {error:.1e} of its terms; {_TOLERANCE:.0e} is allowed"
    return None


def _providers(case: Case, device: str) -> list[Provider]:
    providers = [Provider("copy", _copy, copied, floor=True), Provider("eager", mask_gradient_reference, _check)]
    if device == "cuda":
        providers.append(compiled(mask_gradient_reference, _check, device))
    return providers + importance_backends(lambda ops: ops.mask_gradient, _check, device)


def _bytes(case: Case) -> int:
    return 2 * case.samples * case.tokens * case.shapes[0][1] * case.itemsize


OP = Op("mask_gradient", token_counts, _inputs, _providers, moved_bytes=_bytes, input_bytes=_bytes)
