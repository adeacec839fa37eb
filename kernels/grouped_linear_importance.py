"""`grouped_linear_importance`: `linear_importance` of all experts of a layer, whose tokens are ragged, by one launch.

The same product and scores as in `linear_importance`, with a dimension of the grid for the experts. A sample's rows
begin and end anywhere, so they are read by pointers: what a descriptor reads beyond them would be another sample's.
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
    """One tile of an expert's g_n = a_n^T b_n, of samples_per_program samples n in turn; scored, not written.

    a_ptr: [R, A], b_ptr: [R, B], w_ptr: [E, A, B] (COLUMNS: [E, B, A]), of unit inner stride. offsets_ptr: [E * N + 1]
    int64, where each expert's samples begin in a and b. fp32 accumulation, fixed order, no atomics. A sample without
    rows has a gradient of zeros.

    sums_ptr: [E, parts, columns of tiles, 2, A] fp32; the sums over the tile's columns of |w g| and w^2 g^2.
    statistics_ptr: [E, parts, tiles, 5] fp32: of finite elements sum|g|, sum g^2, max|g|, min|g|; number of others.
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


# Compiled for sm_80 and sm_90 none spills a register, as `linear_importance`'s own for fp32 would: rows have more sums.
_FP32 = LinearImportanceConfig(BLOCK_A=64, BLOCK_B=64, BLOCK_T=16)


def config_for(A: int, B: int, dtype: torch.dtype) -> LinearImportanceConfig:
    """How a product [A, B] of inputs of `dtype` is cut up."""
    if dtype == torch.float32 and not (A % 16 or B % 16):
        return _FP32
    return configs_for(A, B, dtype, descriptors=False)[0]


def grouped_linear_importance_triton(
    x: Tensor, dy: Tensor, w: Tensor, offsets: Tensor, columns: bool, config: LinearImportanceConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Row (or column) sums and statistics of each expert's gradients g_n = dy_n^T x_n, summed over samples.

    Formed and scored in registers, as by `linear_importance_triton`; partial sums are added in fixed order.

    Args:
        x: [R, I] fp32, bf16 or fp16, unit inner stride, the inputs, expert by expert and sample by sample.
        dy: [R, O] same dtype, unit inner stride, the gradient of each sample's loss with respect to the outputs.
        w: [E, O, I] fp32, bf16 or fp16, unit inner stride, the weights.
        offsets: [E * N + 1] int64 on the same device, unit stride, where each expert's samples begin, and the end.
        columns: sum over the rows of each column, instead of over the columns of each row.
        config: how the product is cut up; by default `config_for` its sizes and dtype.

    Returns:
        [E, 2, O] (columns: [E, 2, I]) fp32, sums of |w g_n| and w^2 g_n^2, non-finite where an element of g_n is; and
        [E, 5] fp32, statistics of an expert's g_n: sum|g|, sum g^2, max|g|, min|g|, number of non-finite elements.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        # Triton's interpreter, the only way to run on the CPU, multiplies the bits of bf16. fp32 holds them exactly.
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
