"""`grouped_linear_importance`: `linear_importance` of all experts of a layer, over ragged tokens, in one launch.

The products and scores are those of `linear_importance`, and so is the division of work, with a third grid dimension
for the experts: a program computes one BLOCK_A x BLOCK_B tile of an expert's gradient for a part of the samples, one
sample after the other, and writes two partial sums per row of the tile and one entry of statistics. PyTorch adds the
partial sums, in an order that depends only on their shape: no atomics, the same bits every time.

Tokens are sorted by expert and sample, and each pair's rows begin and end anywhere. So they are read by masked pointer
loads: a TMA box would read past a sample's last row into the next sample. Non-finite elements are counted in the kernel
itself, without a second one as in `linear_importance`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradprune.kernels.launch import ceil_div, device_of
from gradprune.kernels.linear_importance import (
    LinearImportanceConfig,
    add_statistics,
    configs_for,
    product_by_pointers,
    samples_in_turn,
    store_statistics,
    tile_of_program,
    weight_tile,
)


@triton.jit(do_not_specialize=["N", "samples_per_program"])
def _grouped_linear_importance_kernel(
    a_ptr,
    b_ptr,
    w_ptr,
    offsets_ptr,
    sums_ptr,
    statistics_ptr,
    N,
    A,
    B,
    samples_per_program,
    stride_at,
    stride_bt,
    stride_we,
    stride_w,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_A: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute and score one tile of g_n = a_n^T b_n for one expert and samples_per_program samples n, one by one.

    Grid: (tiles, parts of the samples, experts). fp32 accumulation in a fixed order, no atomics; g_n is not written. A
    sample of which the expert sees no token has a gradient of zeros.

    a_ptr: [R, A], b_ptr: [R, B], w_ptr: [E, A, B] (with COLUMNS [E, B, A]), all of unit inner stride.
    offsets_ptr: [E * N + 1] int64, the rows of a and b at which each expert's samples begin, and the end of the last.
    sums_ptr: [E, parts, columns of tiles, 2, A] fp32, sums over the tile's columns of |w g| and of w^2 g^2.
    statistics_ptr: [E, parts, tiles, 5] fp32: sum|g|, sum g^2, max|g|, min|g| of the finite elements, and the number of
        non-finite elements.
    """
    tile_a, tile_b = tile_of_program(A, B, BLOCK_A, BLOCK_B, GROUP_A)
    row = tile_a * BLOCK_A
    column = tile_b * BLOCK_B
    part = tl.program_id(1)
    expert = tl.program_id(2).to(tl.int64)
    rows = row + tl.arange(0, BLOCK_A)
    columns = column + tl.arange(0, BLOCK_B)
    inside = (rows < A)[:, None] & (columns < B)[None, :]
    row_abs = tl.zeros((BLOCK_A,), tl.float32)
    row_square = tl.zeros((BLOCK_A,), tl.float32)
    sum_abs = tl.zeros((BLOCK_A,), tl.float32)
    sum_square = tl.zeros((BLOCK_A,), tl.float32)
    max_abs = tl.zeros((BLOCK_A,), tl.float32)
    min_abs = tl.full((BLOCK_A,), float("inf"), tl.float32)
    others = tl.zeros((BLOCK_A,), tl.float32)
    first = part * samples_per_program
    for n in range(first, tl.minimum(first + samples_per_program, N)):
        begin = tl.load(offsets_ptr + expert * N + n)
        tokens = (tl.load(offsets_ptr + expert * N + n + 1) - begin).to(tl.int32)
        g = product_by_pointers(
            a_ptr + begin * stride_at, b_ptr + begin * stride_bt, rows, columns, A, B, tokens, stride_at, stride_bt,
            BLOCK_A, BLOCK_B, BLOCK_T,
        )  # fmt: skip
        sum_abs, sum_square, max_abs, min_abs, others = add_statistics(
            g, inside, sum_abs, sum_square, max_abs, min_abs, others
        )
        w = w_ptr + expert * stride_we
        product = weight_tile(w, row, column, A, B, stride_w, BLOCK_A, BLOCK_B, COLUMNS, False) * g
        row_abs += tl.sum(tl.abs(product), 1)
        row_square += tl.sum(product * product, 1)

    of_expert = expert * tl.num_programs(1) + part
    sums = sums_ptr + (of_expert * tl.cdiv(B, BLOCK_B) + tile_b) * 2 * A + rows
    tl.store(sums, row_abs, mask=rows < A)
    tl.store(sums + A, row_square, mask=rows < A)
    statistics = statistics_ptr + (of_expert * tl.num_programs(0) + tile_a * tl.cdiv(B, BLOCK_B) + tile_b) * 5
    store_statistics(statistics, sum_abs, sum_square, max_abs, min_abs, others)


# Spills no register when compiled for sm_80 and sm_90. The fp32 configuration of `linear_importance` would spill here,
# because this kernel keeps its statistics row by row, and not for 16 rows together.
_FP32 = LinearImportanceConfig(BLOCK_A=64, BLOCK_B=64, BLOCK_T=16)


def config_for(A: int, B: int, dtype: torch.dtype) -> LinearImportanceConfig:
    """The configuration for a product [A, B] of inputs of `dtype`."""
    if dtype == torch.float32 and not (A % 16 or B % 16):
        return _FP32
    return configs_for(A, B, dtype, descriptors=False)[0]


def grouped_linear_importance_triton(
    x: Tensor, dy: Tensor, w: Tensor, offsets: Tensor, columns: bool, config: LinearImportanceConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Row (or column) sums and statistics of each expert's gradients g_n = dy_n^T x_n, summed over samples.

    Gradients are formed and scored in registers and never written; partial sums are added in a fixed order.

    Args:
        x: [R, I] fp32, bf16 or fp16, unit inner stride, the inputs, sorted by expert and then by sample.
        dy: [R, O] same dtype, unit inner stride, the gradient of each sample's loss with respect to the outputs.
        w: [E, O, I] fp32, bf16 or fp16, unit inner stride, the weights.
        offsets: [E * N + 1] int64 on the same device, unit stride, the rows at which each expert's samples begin, and
            the end of the last.
        columns: return column sums (over the rows of each column) instead of row sums.
        config: how the product is divided into tiles; None for that of `config_for`.

    Returns:
        [E, 2, O] (with `columns` [E, 2, I]) fp32, sums of |w g_n| and of w^2 g_n^2, non-finite where an element of g_n
        is; and [E, 5] fp32, statistics of each expert's g_n: sum|g|, sum g^2, max|g|, min|g| of the finite elements,
        and the number of non-finite elements.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        # Triton's interpreter, the only way to run on the CPU, would multiply bf16's bit patterns as integers. fp32
        # represents bf16 exactly.
        x, dy = x.float(), dy.float()
    a, b = (x, dy) if columns else (dy, x)
    height, width, experts = a.shape[1], b.shape[1], len(w)
    samples = (len(offsets) - 1) // max(1, experts)
    config = config or config_for(height, width, x.dtype)
    tiles_a, tiles_b = ceil_div(height, config.BLOCK_A), ceil_div(width, config.BLOCK_B)
    in_turn = samples_in_turn(samples, tiles_b * experts, height)
    parts = ceil_div(samples, in_turn)
    sums = torch.empty(experts, parts * tiles_b, 2, height, dtype=torch.float32, device=w.device)
    statistics = torch.empty(experts, parts * tiles_a * tiles_b, 5, dtype=torch.float32, device=w.device)
    if not statistics.numel():
        nothing = torch.tensor([0.0, 0.0, 0.0, float("inf"), 0.0], device=w.device)
        return sums.new_zeros(experts, 2, height), nothing.repeat(experts, 1)
    with device_of(w):
        _grouped_linear_importance_kernel[(tiles_a * tiles_b, parts, experts)](
            a,
            b,
            w,
            offsets,
            sums,
            statistics,
            samples,
            height,
            width,
            in_turn,
            a.stride(0),
            b.stride(0),
            w.stride(0),
            w.stride(1),
            COLUMNS=columns,
            **config.launched_with,
        )
    added, squares, largest, smallest, others = statistics.unbind(2)
    of_experts = (added.sum(1), squares.sum(1), largest.amax(1), smallest.amin(1), others.sum(1))
    return sums.sum(1), torch.stack(of_experts, 1)
