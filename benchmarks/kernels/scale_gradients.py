"""scale_gradients, in place: eager tensor by tensor, `torch._foreach_mul_` and our backends; the floor is a copy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cases import gradient_lists
from benchmarks.kernels.gradient_inputs import copy_buffer, gradients_and_buffers
from benchmarks.kernels.op import Case, Op
from benchmarks.kernels.providers import copied, gradient_backends
from benchmarks.timing import Provider

# Turns scale the same gradients repeatedly: -1 keeps their magnitude, and an op cannot skip it as it may skip 1.
_SCALE = -1.0


def _inputs(case: Case, number: int, device: str) -> tuple[Any, ...]:
    return gradients_and_buffers(case, number, device, 1.0)


def _eager(grads: list[Tensor], *_buffers: Tensor) -> list[Tensor]:
    for grad in grads:
        grad.mul_(_SCALE)
    return grads


def _foreach(grads: list[Tensor], *_buffers: Tensor) -> list[Tensor]:
    torch._foreach_mul_(grads, [_SCALE] * len(grads))
    return grads


def _ours(op: Callable[..., None], grads: list[Tensor], *_buffers: Tensor) -> list[Tensor]:
    op(grads, [_SCALE] * len(grads))
    return grads


def _check(found: list[Tensor], inputs: tuple[Any, ...]) -> str | None:
    right = [torch.equal(have, grad * _SCALE) for have, grad in zip(found, inputs[0], strict=True)]
    return None if all(right) else f"{right.count(False)} of {len(right)} gradients are not grad * {_SCALE}"


def _providers(case: Case, device: str) -> list[Provider]:
    return [
        Provider("copy", copy_buffer, copied, floor=True),
        Provider("eager", _eager, _check),
        Provider("foreach", _foreach, _check),
        *gradient_backends("scale_gradients", _ours, _check, device),
    ]


def _moved(case: Case) -> int:
    return 2 * case.elements * case.itemsize


OP = Op("scale_gradients", gradient_lists, _inputs, _providers, moved_bytes=_moved, input_bytes=_moved)
