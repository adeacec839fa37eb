"""`taylor_score`: row and column sums of |w g| and w^2 g^2, and the statistics of g, from one read of each."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class TaylorScoreConfig:
    """How the matrix is cut up.

    A program walks down ROWS rows of BLOCK_I columns in tiles of BLOCK_O rows. It keeps the column sums in registers
    and writes 2 fp32 numbers per row of its strip and 2 per column: 8/BLOCK_I + 8/ROWS bytes per element.
    """

    ROWS: int = 128
    BLOCK_O: int = 8
    BLOCK_I: int = 512
    num_warps: int = 4


@triton.jit
def _taylor_score_kernel(
    w_ptr,
    g_ptr,
    rows_ptr,
    columns_ptr,
    statistics_ptr,
    O,  # noqa: E741 - the number of rows, as everywhere in the project
    I,  # noqa: E741
    stride_wo,
    stride_go,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
):
    """One strip of W and G [O, I] (unit inner stride), fp32 accumulation, fixed order, no atomics.

    rows_ptr: [strips of columns, 2, O] fp32; this strip's sums over its columns of |w g|, w^2 g^2, if ROW_SUMS.
    columns_ptr: [strips of rows, 2, I] fp32; this strip's sums over its rows, if COLUMN_SUMS.
    statistics_ptr: [programs, 5] fp32: sum|g|, sum g^2, max|g|, min|g|, non-finite count.
    """
    strip_o = tl.program_id(0)
    strip_i = tl.program_id(1)
    columns = strip_i * BLOCK_I + tl.arange(0, BLOCK_I)
    in_columns = columns < I
    column_abs = tl.zeros((BLOCK_I,), tl.float32)
    column_square = tl.zeros((BLOCK_I,), tl.float32)
    sum_abs = tl.zeros((BLOCK_I,), tl.float32)
    sum_square = tl.zeros((BLOCK_I,), tl.float32)
    max_abs = tl.zeros((BLOCK_I,), tl.float32)
    min_abs = tl.full((BLOCK_I,), float("inf"), tl.float32)
    bad = tl.zeros((BLOCK_I,), tl.float32)
    for start in range(0, ROWS, BLOCK_O):
        rows = strip_o * ROWS + start + tl.arange(0, BLOCK_O)
        in_rows = rows < O
        inside = in_rows[:, None] & in_columns[None, :]
        offsets = rows.to(tl.int64)
        w = tl.load(w_ptr + offsets[:, None] * stride_wo + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + offsets[:, None] * stride_go + columns[None, :], mask=inside, other=0.0).to(tl.float32)

        product = w * g
        absolute = tl.abs(product)
        square = product * product
        if ROW_SUMS:
            row_base = rows_ptr + strip_i.to(tl.int64) * 2 * O + rows
            tl.store(row_base, tl.sum(absolute, 1), mask=in_rows)
            tl.store(row_base + O, tl.sum(square, 1), mask=in_rows)
        if COLUMN_SUMS:
            column_abs += tl.sum(absolute, 0)
            column_square += tl.sum(square, 0)

        magnitude = tl.abs(g)
        finite = magnitude < float("inf")  # false for NaN too
        clean = tl.where(finite, magnitude, 0.0)
        sum_abs += tl.sum(clean, 0)
        sum_square += tl.sum(clean * clean, 0)
        max_abs = tl.maximum(max_abs, tl.max(clean, 0))
        min_abs = tl.minimum(min_abs, tl.min(tl.where(finite & inside, magnitude, float("inf")), 0))
        bad += tl.sum(tl.where(finite, 0.0, 1.0), 0)

    if COLUMN_SUMS:
        column_base = columns_ptr + strip_o.to(tl.int64) * 2 * I + columns
        tl.store(column_base, column_abs, mask=in_columns)
        tl.store(column_base + I, column_square, mask=in_columns)
    statistics_base = statistics_ptr + (strip_o * tl.num_programs(1) + strip_i) * 5
    tl.store(statistics_base, tl.sum(sum_abs, 0))
    tl.store(statistics_base + 1, tl.sum(sum_square, 0))
    tl.store(statistics_base + 2, tl.max(max_abs, 0))
    tl.store(statistics_base + 3, tl.min(min_abs, 0))
    tl.store(statistics_base + 4, tl.sum(bad, 0))


def taylor_score_triton(
    w: Tensor, g: Tensor, row_sums: bool = True, column_sums: bool = True, config: TaylorScoreConfig | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Row sums, column sums and statistics of one weight and its gradient.

    Reads W and G once (4 bytes an element in bf16); the strips' partial sums are added by a second, small reduction,
    in fixed order, so that the result has the same bits every time.

    Args:
        w: [O, I] fp32, bf16 or fp16, unit inner stride.
        g: [O, I] the same.
        row_sums, column_sums: which sums to compute.
        config: how the matrix is cut up.

    Returns:
        rows [2, O] and columns [2, I], each sums of |w g| and w^2 g^2, None if not asked for; and statistics [5] of g:
        sum|g|, sum g^2, max|g|, min|g|, number of non-finite elements (which enter none of the other four). fp32.
    """
    config = config or TaylorScoreConfig()
    height, width = w.shape
    strips_o, strips_i = triton.cdiv(height, config.ROWS), triton.cdiv(width, config.BLOCK_I)
    rows = torch.empty(strips_i, 2, height if row_sums else 0, dtype=torch.float32, device=w.device)
    columns = torch.empty(strips_o, 2, width if column_sums else 0, dtype=torch.float32, device=w.device)
    statistics = torch.empty(strips_o * strips_i, 5, dtype=torch.float32, device=w.device)
    if height and width:
        _taylor_score_kernel[(strips_o, strips_i)](
            w,
            g,
            rows,
            columns,
            statistics,
            height,
            width,
            w.stride(0),
            g.stride(0),
            ROWS=config.ROWS,
            BLOCK_O=config.BLOCK_O,
            BLOCK_I=config.BLOCK_I,
            ROW_SUMS=row_sums,
            COLUMN_SUMS=column_sums,
            num_warps=config.num_warps,
        )
    return rows.sum(0) if row_sums else None, columns.sum(0) if column_sums else None, merged_statistics(statistics)


def merged_statistics(statistics: Tensor) -> Tensor:
    """[K, 5] statistics, one row per program, merged into the [5] of the whole gradient."""
    if not len(statistics):
        return statistics.new_tensor([0.0, 0.0, 0.0, float("inf"), 0.0])
    total = statistics.sum(0)
    return torch.stack([total[0], total[1], statistics[:, 2].amax(), statistics[:, 3].amin(), total[4]])
