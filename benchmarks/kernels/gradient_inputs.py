"""Inputs for the ops on lists of gradients, and the copy that is their floor."""

from torch import Tensor

from benchmarks.kernels.op import Case


def gradients_and_buffers(case: Case, number: int, device: str, copied: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """The case's gradients, and a source and a target for a copy, flat, of `copied` times as many elements."""
    grads = [case.random(shape, len(case.shapes) * number + k, device) for k, shape in enumerate(case.shapes)]
    source = case.random((int(case.elements * copied),), number, device)
    return grads, source, source.clone().zero_()


def copy_buffer(_grads: list[Tensor], source: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
    """Copy `source` to `to`, both contiguous; return (to, source)."""
    return to.copy_(source), source
