"""Helpers that the launches of all kernels share."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Context manager that makes the tensor's device the current one; it does nothing for a CPU tensor.

    Triton launches on the current device: the kernels of a model on cuda:1 would otherwise run in cuda:0's context.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def ceil_div(total: int, size: int) -> int:
    """The number of parts of `size` that cover `total`; `triton.cdiv`, made for kernels, takes microseconds here."""
    return -(-total // size)
