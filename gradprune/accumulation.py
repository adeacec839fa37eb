"""The dtype in which sums are accumulated."""

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which products of the tensors are summed: fp64 if all of them are fp64, else fp32."""
    return torch.float64 if all(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
