"""`mask_gradient`: the gradient of a mask on each input column of a layer, and the column's sum of squares, by sample.

For each sample n and column i, the sums over tokens of x dx and of x^2, from one read of X and dX: a kernel bound by
memory. A program owns BLOCK_I columns of one sample and walks through all of its tokens, BLOCK_T at a time. So no
second stage is needed: it adds element by element in registers, combines the BLOCK_T rows at the end, and writes 2 fp32
numbers per column. All of this happens in a fixed order and without atomics, so the result has the same bits every
time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradprune.kernels.launch import ceil_div, device_of


@dataclass(frozen=True)
class MaskGradientConfig:
    """A program walks through BLOCK_I columns of one sample, BLOCK_T tokens at a time."""

    BLOCK_T: int = 16
    BLOCK_I: int = 128
    num_warps: int = 8


@triton.jit(do_not_specialize=["T"])
def _mask_gradient_kernel(
    x_ptr,
    dx_ptr,
    gradient_ptr,
    square_ptr,
    T,
    I,  # noqa: E741 - the number of columns, as everywhere in the project
    stride_xn,
    stride_xt,
    stride_dxn,
    stride_dxt,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Sum over the tokens of one sample for BLOCK_I columns. Grid: (blocks of columns, samples). fp32 accumulation.

    x_ptr, dx_ptr: [N, T, I], unit inner stride.
    gradient_ptr, square_ptr: [N, I] fp32, the sums over tokens of x dx and of x^2.
    """
    n = tl.program_id(1).to(tl.int64)
    tokens = tl.arange(0, BLOCK_T)
    columns = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    in_columns = (columns < I)[None, :]
    x_ptrs = x_ptr + n * stride_xn + tokens.to(tl.int64)[:, None] * stride_xt + columns[None, :]
    dx_ptrs = dx_ptr + n * stride_dxn + tokens.to(tl.int64)[:, None] * stride_dxt + columns[None, :]
    gradient = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
    square = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
    for start in range(0, T, BLOCK_T):
        inside = (start + tokens < T)[:, None] & in_columns
        x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
        dx = tl.load(dx_ptrs, mask=inside, other=0.0).to(tl.float32)
        gradient += x * dx
        square += x * x
        x_ptrs += tl.full((), BLOCK_T, tl.int64) * stride_xt
        dx_ptrs += tl.full((), BLOCK_T, tl.int64) * stride_dxt
    tl.store(gradient_ptr + n * I + columns, tl.sum(gradient, 0), mask=columns < I)
    tl.store(square_ptr + n * I + columns, tl.sum(square, 0), mask=columns < I)


def mask_gradient_triton(x: Tensor, dx: Tensor, config: MaskGradientConfig | None = None) -> tuple[Tensor, Tensor]:
    """The sums over tokens of x dx and of x^2, by sample.

    Args:
        x: [N, T, I] fp32, bf16 or fp16, unit inner stride, the layer's input.
        dx: [N, T, I], the gradient of each sample's loss with respect to it, with the same requirements.
        config: how columns and tokens are divided; None for the default.

    Returns:
        [N, I] each, fp32. Added in a fixed order: the same bits every time.
    """
    config = config or MaskGradientConfig()
    samples, tokens, width = x.shape
    gradient, square = torch.empty(2, samples, width, dtype=torch.float32, device=x.device).unbind()
    if samples and width:
        with device_of(x):
            _mask_gradient_kernel[(ceil_div(width, config.BLOCK_I), samples)](
                x,
                dx,
                gradient,
                square,
                tokens,
                width,
                x.stride(0),
                x.stride(1),
                dx.stride(0),
                dx.stride(1),
                BLOCK_T=config.BLOCK_T,
                BLOCK_I=config.BLOCK_I,
                num_warps=config.num_warps,
            )
    return gradient, square
