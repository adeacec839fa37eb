"""`linear_importance`: each sample's weight gradient of a linear layer, scored in registers and never written."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradprune.kernels.taylor_score import merged_statistics


@dataclass(frozen=True)
class LinearImportanceConfig:
    """How the gradient [O, I] is cut up.

    A program computes one sample's tile of BLOCK_O x BLOCK_I, BLOCK_T tokens at a time. Tiles are walked down GROUP_O
    rows of tiles and then to the next column, so that programs that run together share their inputs in the L2 cache.
    """

    BLOCK_O: int
    BLOCK_I: int
    BLOCK_T: int
    GROUP_O: int = 8
    num_warps: int = 8
    num_stages: int = 3


@triton.jit
def _tile_of_program(O, I, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP_O: tl.constexpr):  # noqa: E741
    """This program's row and column of tiles: down GROUP_O rows of tiles first, then to the next column."""
    program = tl.program_id(0)
    tiles_o = tl.cdiv(O, BLOCK_O)
    tiles_i = tl.cdiv(I, BLOCK_I)
    group = program // (GROUP_O * tiles_i)
    height = tl.minimum(tiles_o - group * GROUP_O, GROUP_O)
    within = program % (GROUP_O * tiles_i)
    return group * GROUP_O + within % height, within // height


@triton.jit
def _gradient_tile(
    x_ptr,
    dy_ptr,
    rows,
    columns,
    O,  # noqa: E741
    I,  # noqa: E741
    T,
    stride_xt,
    stride_dyt,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """dy^T x of one sample, [BLOCK_O, BLOCK_I] fp32; x_ptr and dy_ptr point at the sample."""
    tokens = tl.arange(0, BLOCK_T)
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_xt + columns[None, :]
    dy_ptrs = dy_ptr + tokens.to(tl.int64)[None, :] * stride_dyt + rows[:, None]
    g = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, T, BLOCK_T):
        in_tokens = start + tokens < T
        x = tl.load(x_ptrs, mask=in_tokens[:, None] & (columns < I)[None, :], other=0.0)
        dy = tl.load(dy_ptrs, mask=in_tokens[None, :] & (rows < O)[:, None], other=0.0)
        g = tl.dot(dy, x, g, input_precision="ieee")
        x_ptrs += tl.full((), BLOCK_T, tl.int64) * stride_xt
        dy_ptrs += tl.full((), BLOCK_T, tl.int64) * stride_dyt
    return g


@triton.jit
def _store_statistics(base, sum_abs, sum_square, max_abs, min_abs, bad, in_rows):
    """A tile's statistics from those of its rows; the first three are 0 beyond the matrix."""
    tl.store(base, tl.sum(sum_abs, 0))
    tl.store(base + 1, tl.sum(sum_square, 0))
    tl.store(base + 2, tl.max(max_abs, 0))
    tl.store(base + 3, tl.min(tl.where(in_rows, min_abs, float("inf")), 0))
    tl.store(base + 4, tl.sum(tl.where(in_rows, bad, 0.0), 0))


@triton.jit
def _linear_importance_kernel(
    x_ptr,
    dy_ptr,
    w_ptr,
    rows_ptr,
    columns_ptr,
    statistics_ptr,
    T,
    O,  # noqa: E741 - the number of rows, as everywhere in the project
    I,  # noqa: E741
    stride_xn,
    stride_xt,
    stride_dyn,
    stride_dyt,
    stride_wo,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_O: tl.constexpr,
    HAS_I_TAIL: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
):
    """One tile of g_n = dy_n^T x_n of sample n = program_id(1); scored, not written.

    X [N, T, I], dY [N, T, O] and W [O, I] have unit inner strides. fp32 accumulation, fixed order, no atomics.

    rows_ptr: [N, columns of tiles, 2, O] fp32; the tile's sums over its columns of |w g|, w^2 g^2, if ROW_SUMS.
    columns_ptr: [N, rows of tiles, 2, I] fp32; the tile's sums over its rows, if COLUMN_SUMS.
    statistics_ptr: [N, tiles, 5] fp32: sum|g|, sum g^2, max|g|, min|g|, non-finite count.
    HAS_I_TAIL: I is no multiple of BLOCK_I, and the last tiles reach beyond it.
    """
    tile_o, tile_i = _tile_of_program(O, I, BLOCK_O, BLOCK_I, GROUP_O)
    n = tl.program_id(1).to(tl.int64)
    rows = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    columns = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    in_rows = rows < O
    in_columns = columns < I
    g = _gradient_tile(
        x_ptr + n * stride_xn, dy_ptr + n * stride_dyn, rows, columns, O, I, T, stride_xt, stride_dyt,
        BLOCK_O, BLOCK_I, BLOCK_T,
    )  # fmt: skip
    magnitude = tl.abs(g)
    if HAS_I_TAIL:
        magnitude = tl.where(in_columns[None, :], magnitude, float("inf"))
    finite = magnitude < float("inf")  # false for NaN too
    clean = tl.where(finite, magnitude, 0.0)
    # The columns beyond I were counted too.
    beyond = tl.maximum((tile_i + 1) * BLOCK_I - I, 0)
    _store_statistics(
        statistics_ptr + (n * tl.num_programs(0) + tl.program_id(0)) * 5,
        tl.sum(clean, 1),
        tl.sum(clean * clean, 1),
        tl.max(clean, 1),
        tl.min(tl.where(finite, magnitude, float("inf")), 1),
        tl.sum(tl.where(finite, 0.0, 1.0), 1) - beyond,
        in_rows,
    )

    # Beyond the matrix w is 0 and g is 0, or NaN where all of its row or column inside is non-finite.
    inside = in_rows[:, None] & in_columns[None, :]
    w_ptrs = w_ptr + rows.to(tl.int64)[:, None] * stride_wo + columns[None, :]
    product = tl.load(w_ptrs, mask=inside, other=0.0).to(tl.float32) * g
    if ROW_SUMS:
        row_ptrs = rows_ptr + (n * tl.cdiv(I, BLOCK_I) + tile_i) * 2 * O + rows
        tl.store(row_ptrs, tl.sum(tl.abs(product), 1), mask=in_rows)
        tl.store(row_ptrs + O, tl.sum(product * product, 1), mask=in_rows)
    if COLUMN_SUMS:
        column_ptrs = columns_ptr + (n * tl.cdiv(O, BLOCK_O) + tile_o) * 2 * I + columns
        tl.store(column_ptrs, tl.sum(tl.abs(product), 0), mask=in_columns)
        tl.store(column_ptrs + I, tl.sum(product * product, 0), mask=in_columns)


# Each compiles without spilled registers for sm_80 and sm_90. None has been timed on a GPU.
_FP32 = LinearImportanceConfig(BLOCK_O=128, BLOCK_I=128, BLOCK_T=16)
_FP32_RAGGED = LinearImportanceConfig(BLOCK_O=64, BLOCK_I=128, BLOCK_T=16)
_HALF = LinearImportanceConfig(BLOCK_O=128, BLOCK_I=128, BLOCK_T=64, num_stages=4)
_HALF_RAGGED = LinearImportanceConfig(BLOCK_O=64, BLOCK_I=128, BLOCK_T=32)


def config_for(O: int, I: int, dtype: torch.dtype) -> LinearImportanceConfig:  # noqa: E741
    """The configuration for a gradient [O, I] from inputs of `dtype`.

    Widths that are not a multiple of 16 are read element by element, which takes registers.
    """
    ragged = bool(O % 16 or I % 16)
    if dtype == torch.float32:
        return _FP32_RAGGED if ragged else _FP32
    return _HALF_RAGGED if ragged else _HALF


def linear_importance_triton(
    x: Tensor,
    dy: Tensor,
    w: Tensor,
    row_sums: bool = True,
    column_sums: bool = True,
    config: LinearImportanceConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Row sums, column sums and statistics of each sample's weight gradient g_n = dy_n^T x_n, summed over samples.

    The gradient is formed and scored in registers, in fp32 (fp32 inputs are multiplied in fp32, not in TF32), and never
    written. The tiles' partial sums are added by a second, small reduction, in fixed order, so that the result has the
    same bits every time.

    Args:
        x: [N, T, I] fp32, bf16 or fp16, unit inner stride, the layer's input.
        dy: [N, T, O] same dtype, unit inner stride, the gradient of each sample's loss with respect to the output.
        w: [O, I] fp32, bf16 or fp16, unit inner stride, the weight.
        row_sums, column_sums: which sums to compute.
        config: how the gradient is cut up; by default `config_for` its shape and dtype.

    Returns:
        rows [2, O] and columns [2, I], each sums of |w g_n| and w^2 g_n^2, None if not asked for; and statistics [5] of
        all g_n: sum|g|, sum g^2, max|g|, min|g|, number of non-finite elements (which enter none of the others). fp32.
    """
    samples, tokens, width = x.shape
    height = w.shape[0]
    config = config or config_for(height, width, x.dtype)
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        # Triton's interpreter, the only way to run on the CPU, multiplies the bits of bf16. fp32 holds them exactly.
        x, dy = x.float(), dy.float()
    tiles_o, tiles_i = triton.cdiv(height, config.BLOCK_O), triton.cdiv(width, config.BLOCK_I)
    rows = torch.empty(samples * tiles_i, 2, height if row_sums else 0, dtype=torch.float32, device=w.device)
    columns = torch.empty(samples * tiles_o, 2, width if column_sums else 0, dtype=torch.float32, device=w.device)
    statistics = torch.empty(samples * tiles_o * tiles_i, 5, dtype=torch.float32, device=w.device)
    if len(statistics):
        _linear_importance_kernel[(tiles_o * tiles_i, samples)](
            x,
            dy,
            w,
            rows,
            columns,
            statistics,
            tokens,
            height,
            width,
            x.stride(0),
            x.stride(1),
            dy.stride(0),
            dy.stride(1),
            w.stride(0),
            BLOCK_O=config.BLOCK_O,
            BLOCK_I=config.BLOCK_I,
            BLOCK_T=config.BLOCK_T,
            GROUP_O=config.GROUP_O,
            HAS_I_TAIL=width % config.BLOCK_I != 0,
            ROW_SUMS=row_sums,
            COLUMN_SUMS=column_sums,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return rows.sum(0) if row_sums else None, columns.sum(0) if column_sums else None, merged_statistics(statistics)
