"""Inputs of the ops that take a list of gradients, and the copy that is their floor."""

from torch import Tensor

from benchmarks.kernels.op import Case


def gradients_and_buffers(case: Case, number: int, device: str, copied: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """The gradients, and two flat buffers of `copied` times as many elements, to copy one into the other."""
    grads = [case.random(shape, len(case.shapes) * number + k, device) for k, shape in enumerate(case.shapes)]
    source = case.random((int(case.elements * copied),), number, device)
    return grads, source, source.clone().zero_()


def copy_buffer(_grads: list[Tensor], source: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
    """One contiguous copy."""
    return to.copy_(source), source
