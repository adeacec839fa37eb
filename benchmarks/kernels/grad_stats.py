"""grad_stats: eager tensor by tensor, `torch._foreach_*` and our backends; the floor is a copy of the same bytes."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cases import gradient_lists
from benchmarks.kernels.gradient_inputs import copy_buffer, gradients_and_buffers
from benchmarks.kernels.op import Case, Op
from benchmarks.kernels.providers import copied, gradient_backends
from benchmarks.timing import Provider
from gradprune.ops.reference import grad_stats_reference
from gradprune.ops.vectors import GradientStatistics


def _inputs(case: Case, number: int, device: str) -> tuple[Any, ...]:
    # The op only reads the gradients; a copy that moves the same number of bytes reads half of it and writes half.
    return gradients_and_buffers(case, number, device, 0.5)


def _eager(grads: list[Tensor], *_buffers: Tensor) -> GradientStatistics[Tensor]:
    return grad_stats_reference(grads)


def _foreach(grads: list[Tensor], *_buffers: Tensor) -> GradientStatistics[Tensor]:
    """What PyTorch offers for lists of tensors: three norms, but neither minimum nor non-finite count.

    Correct for finite gradients only: a non-finite element enters the norms.
    """
    total, norm, largest = (torch._foreach_norm(grads, order, torch.float32) for order in (1, 2, torch.inf))
    smallest = [grad.abs().min().float() for grad in grads]
    bad = [(~grad.isfinite()).sum().float() for grad in grads]
    square = [value * value for value in norm]
    return GradientStatistics(*(torch.stack([*values]) for values in (total, square, largest, smallest, bad)))


def _check(found: GradientStatistics[Tensor], inputs: tuple[Any, ...], tolerance: float = 2e-5) -> str | None:
    """Compare with the reference in fp64, with a relative tolerance for fp32 sums of millions of elements.

    The number of non-finite elements, 0 here, must be exact.
    """
    have, expected = found.pack(), grad_stats_reference([grad.double() for grad in inputs[0]]).pack()
    if have.shape != expected.shape:
        return f"has shape {tuple(have.shape)}, not {tuple(expected.shape)}"
    difference = (have.double().to(expected.device) - expected).abs()
    wrong = ~(difference <= tolerance * expected)
    return f"{int(wrong.sum())} of {wrong.numel()} statistics are off by more than {tolerance}" if wrong.any() else None


def _providers(case: Case, device: str) -> list[Provider]:
    return [
        Provider("copy", copy_buffer, copied, floor=True),
        Provider("eager", _eager, _check),
        # On a CPU, PyTorch's norm adds one element after the other in fp32, hence the larger error.
        Provider("foreach", _foreach, partial(_check, tolerance=5e-3)),
        *gradient_backends("grad_stats", lambda op, grads, *_buffers: op(grads), _check, device),
    ]


def _bytes(case: Case) -> int:
    return case.elements * case.itemsize


OP = Op("grad_stats", gradient_lists, _inputs, _providers, moved_bytes=_bytes, input_bytes=_bytes)
