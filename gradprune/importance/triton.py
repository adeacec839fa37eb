"""The importance ops by Triton kernels, for CUDA tensors (for CPU tensors under Triton's interpreter)."""

import torch
from torch import Tensor

from gradprune.importance.reference import sum_vectors
from gradprune.importance.vectors import ImportanceVectors
from gradprune.kernels import taylor_score as kernel

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def taylor_score_triton(w: Tensor, g: Tensor) -> ImportanceVectors:
    """Row and column sums of |w g|, w g and w^2 g^2, and the statistics of g, from one read of each.

    Args:
        w: [O, I] fp32, bf16 or fp16, the weight; copied where its inner stride is not 1.
        g: [O, I] the same, its gradient.

    Accumulates in fp32 and in fixed order: the same bits every time.

    Raises:
        ValueError: not a matrix, shapes that differ, or an unsupported dtype; names the argument.
    """
    for name, tensor in (("w", w), ("g", g)):
        if tensor.ndim != 2 or tensor.shape != w.shape:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}; w and g are matrices of one shape [O, I]")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name}: dtype {tensor.dtype} is not one of float32, bfloat16, float16")
    rows, columns, statistics = kernel.taylor_score_triton(_unit_inner_stride(w), _unit_inner_stride(g))
    return ImportanceVectors(rows[0], rows[1], rows[2], columns[0], columns[1], columns[2], statistics)


def linear_importance_triton(x: Tensor, dy: Tensor, w: Tensor) -> ImportanceVectors:
    """`taylor_score` of each sample's weight gradient g_n = dy_n^T x_n of a linear layer, summed over samples.

    Args:
        x: [N, T, I] fp32, bf16 or fp16, the layer's input.
        dy: [N, T, O] the same, the gradient of each sample's loss at the layer's output.
        w: [O, I] the same, the weight.

    One sample's gradient of one weight exists at a time, in the inputs' dtype; it is made by `torch.mm`, with fp32
    accumulation, and scored by one kernel.

    Raises:
        ValueError: as `taylor_score_triton`.
    """
    return sum_vectors([taylor_score_triton(w, torch.mm(dy[n].T, x[n])) for n in range(len(x))])


def _unit_inner_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()
