"""`taylor_score`: row and column sums of |w g| and of w^2 g^2, and statistics of g, from one read of W and G.

A kernel bound by memory. Each program owns a strip of ROWS x BLOCK_I elements and walks down its rows, BLOCK_O at a
time. It writes the row sums of each step right away, and at the end the column sums and the statistics, for which every
thread has kept accumulators in registers. W and G are read once, and little is written (see `TaylorScoreConfig`).

`add_partial_sums` then adds the partial results of all programs. They have places of their own (no atomics) and are
added in a fixed order, so the result has the same bits every time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradprune.kernels.launch import ceil_div, device_of
from gradprune.kernels.partial_sums import add_partial_sums


@dataclass(frozen=True)
class TaylorScoreConfig:
    """How the matrix is divided among programs.

    A program walks down a strip of ROWS rows and BLOCK_I columns, BLOCK_O rows at a time. It writes 2 fp32 numbers for
    each row of the strip, each column, or both: 8/BLOCK_I and 8/ROWS bytes per element. With 16 bytes per thread, one
    warp spans BLOCK_I columns, so that row sums stay within a warp and everything else within a thread until the end.
    """

    ROWS: int = 128
    BLOCK_O: int = 4
    BLOCK_I: int = 256
    num_warps: int = 4


def config_for(dtype: torch.dtype) -> TaylorScoreConfig:
    """The configuration for a weight of `dtype`; neither has been timed on a GPU."""
    return TaylorScoreConfig(BLOCK_O=8, BLOCK_I=128) if dtype == torch.float32 else TaylorScoreConfig()


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
    """Score one strip of W and G. Grid: (strips of rows, strips of columns).

    fp32 accumulation in a fixed order, no atomics.

    w_ptr, g_ptr: [O, I], unit inner stride.
    rows_ptr: [strips of columns, 2, O] fp32, sums of |w g| and of w^2 g^2 over this strip's columns; if ROW_SUMS.
    columns_ptr: [strips of rows, 2, I] fp32, the same over this strip's rows; if COLUMN_SUMS.
    statistics_ptr: [programs, 5] fp32: sum|g|, sum g^2, max|g|, min|g| of the finite elements, and the number of
        non-finite elements.
    """
    strip_o = tl.program_id(0)
    strip_i = tl.program_id(1)
    columns = strip_i * BLOCK_I + tl.arange(0, BLOCK_I)
    in_columns = columns < I
    column_abs = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    column_square = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    sum_abs = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    sum_square = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    max_abs = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    min_abs = tl.full((BLOCK_O, BLOCK_I), float("inf"), tl.float32)
    bad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, ROWS, BLOCK_O):
        rows = strip_o * ROWS + start + tl.arange(0, BLOCK_O)
        in_rows = rows < O
        inside = in_rows[:, None] & in_columns[None, :]
        offsets = rows.to(tl.int64)
        w = tl.load(w_ptr + offsets[:, None] * stride_wo + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + offsets[:, None] * stride_go + columns[None, :], mask=inside, other=0.0).to(tl.float32)

        product = w * g
        if ROW_SUMS:
            row_base = rows_ptr + strip_i.to(tl.int64) * 2 * O + rows
            tl.store(row_base, tl.sum(tl.abs(product), 1), mask=in_rows)
            tl.store(row_base + O, tl.sum(product * product, 1), mask=in_rows)
        if COLUMN_SUMS:
            column_abs += tl.abs(product)
            column_square += product * product

        magnitude = tl.abs(g)
        finite = magnitude < float("inf")  # false for NaN too
        clean = tl.where(finite, magnitude, 0.0)
        sum_abs += clean
        sum_square += clean * clean
        max_abs = tl.maximum(max_abs, clean)
        min_abs = tl.minimum(min_abs, tl.where(finite & inside, magnitude, float("inf")))
        bad += tl.where(finite, 0.0, 1.0)

    if COLUMN_SUMS:
        column_base = columns_ptr + strip_o.to(tl.int64) * 2 * I + columns
        tl.store(column_base, tl.sum(column_abs, 0), mask=in_columns)
        tl.store(column_base + I, tl.sum(column_square, 0), mask=in_columns)
    statistics_base = statistics_ptr + (strip_o.to(tl.int64) * tl.num_programs(1) + strip_i) * 5
    tl.store(statistics_base, tl.sum(tl.sum(sum_abs, 1), 0))
    tl.store(statistics_base + 1, tl.sum(tl.sum(sum_square, 1), 0))
    tl.store(statistics_base + 2, tl.max(tl.max(max_abs, 1), 0))
    tl.store(statistics_base + 3, tl.min(tl.min(min_abs, 1), 0))
    tl.store(statistics_base + 4, tl.sum(tl.sum(bad, 1), 0))


def taylor_score_triton(
    w: Tensor, g: Tensor, row_sums: bool = True, column_sums: bool = True, config: TaylorScoreConfig | None = None
) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """Row sums, column sums and statistics of one weight and its gradient.

    Reads W and G once (4 bytes per element in bf16). A second launch for each side adds the strips' partial sums in a
    fixed order, so that the result has the same bits every time.

    Args:
        w: [O, I] fp32, bf16 or fp16, unit inner stride, the weight.
        g: [O, I], its gradient, with the same requirements.
        row_sums, column_sums: which sums to compute; at least one.
        config: how the matrix is divided among programs; None for that of `config_for`.

    Returns:
        One pair for the rows and one for the columns, None for a side that is not asked for: sums [2, O] (or [2, I]) of
        |w g| and of w^2 g^2, and statistics [5] of g: sum|g|, sum g^2, max|g|, min|g| of the finite elements, and the
        number of non-finite elements. fp32.
    """
    config = config or config_for(w.dtype)
    height, width = w.shape
    strips_o, strips_i = ceil_div(height, config.ROWS), ceil_div(width, config.BLOCK_I)
    rows = torch.empty(strips_i, 2, height if row_sums else 0, dtype=torch.float32, device=w.device)
    columns = torch.empty(strips_o, 2, width if column_sums else 0, dtype=torch.float32, device=w.device)
    statistics = torch.empty(strips_o * strips_i, 5, dtype=torch.float32, device=w.device)
    if height and width:
        with device_of(w):
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
    return (
        add_partial_sums(rows, statistics) if row_sums else None,
        add_partial_sums(columns, statistics) if column_sums else None,
    )
