"""The dtype of sums."""

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that products of the tensors are summed in: fp64 where all are fp64, else fp32."""
    return torch.float64 if all(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
