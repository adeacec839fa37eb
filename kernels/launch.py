"""What the launches of all kernels share."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which kernels are launched on the tensor's device, whatever the current one is.

    Triton launches on the current device: a model on cuda:1 would otherwise run in the context of cuda:0.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def ceil_div(total: int, size: int) -> int:
    """How many parts of `size` cover `total`. Triton's own, meant for kernels, takes microseconds."""
    return -(-total // size)
