"""`cheapest_removals`: remove columns one by one, each time the cheapest, in one launch.

With A^-1 and M = W^T W, [k, k] fp64 each, removing column q costs M_qq / A^-1_qq and changes both matrices by

    A^-1 <- A^-1 - s^T s,  s = A^-1_q: / sqrt(A^-1_qq),
    M <- M - s^T d - d^T s,  d = M_q: / sqrt(A^-1_qq) - M_qq / (2 A^-1_qq) s

(`gradprune.ops.removals` derives it). Each removal depends on the one before it, so a single program does all of them.
As PyTorch ops, every removal would take a dozen launches on a few thousand numbers.

The matrices are never updated. Both diagonals, which decide what is cheapest, are kept in registers. The row of A^-1
and of M of the column to remove is read once, when it is removed, and brought up to date from the rows s and d of all
earlier removals. These are scratch memory that stays in the L2 cache; in all, n removals read about n^2 k fp64 numbers
of it. The result is deterministic because one program does everything in a fixed order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradprune.kernels.launch import device_of

MOST_COLUMNS = 1024
"""The largest number of columns: the program keeps several fp64 numbers per column in registers."""


@dataclass(frozen=True)
class CheapestRemovalsConfig:
    """How the rows s and d of earlier removals are read: whole rows, ROWS of them at a time."""

    ROWS: int = 4
    num_warps: int = 8


@triton.jit
def _cheapest_removals_kernel(
    inverse_ptr,
    gram_ptr,
    s_ptr,
    d_ptr,
    taken_ptr,
    costs_ptr,
    columns,
    count,
    stride_inverse,
    stride_gram,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Remove `count` columns; grid: a single program, which computes in fp64.

    inverse_ptr, gram_ptr: [columns, columns] fp64, A^-1 and M = W^T W, of unit inner stride; only read.
    s_ptr, d_ptr: [count, columns] fp64 scratch, one row per removal: s and d of the module's formulas.
    taken_ptr: [count] int64, the removed columns in order. costs_ptr: [count] fp64, the cost of each.
    BLOCK: a power of two, at least `columns`.
    """
    at = tl.arange(0, BLOCK)
    inside = at < columns
    inverse = tl.load(inverse_ptr + at * (stride_inverse + 1), mask=inside, other=1.0)
    gram = tl.load(gram_ptr + at * (stride_gram + 1), mask=inside, other=0.0)
    left = inside
    for step in range(0, count):
        costs = tl.where(left, tl.maximum(gram / inverse, 0.0), float("inf"))
        column = tl.argmin(costs, 0)
        tl.store(taken_ptr + step, column.to(tl.int64))
        tl.store(costs_ptr + step, tl.min(costs, 0))
        own = tl.load(inverse_ptr + column * stride_inverse + at, mask=inside, other=0.0)
        change = tl.load(gram_ptr + column * stride_gram + at, mask=inside, other=0.0)
        for first in range(0, step, ROWS):
            rows = first + tl.arange(0, ROWS)
            gone = rows < step
            s_at = tl.load(s_ptr + rows * columns + column, mask=gone, other=0.0)[:, None]
            d_at = tl.load(d_ptr + rows * columns + column, mask=gone, other=0.0)[:, None]
            cells = rows[:, None] * columns + at[None, :]
            both = gone[:, None] & inside[None, :]
            s = tl.load(s_ptr + cells, mask=both, other=0.0)
            d = tl.load(d_ptr + cells, mask=both, other=0.0)
            own -= tl.sum(s_at * s, 0)
            change -= tl.sum(s_at * d + d_at * s, 0)
        here = at == column
        root = tl.sqrt(tl.sum(tl.where(here, own, 0.0), 0))
        own = own / root
        change = change / root
        middle = tl.sum(tl.where(here, change, 0.0), 0) / root
        change -= 0.5 * middle * own
        tl.store(s_ptr + step * columns + at, own, mask=inside)
        tl.store(d_ptr + step * columns + at, change, mask=inside)
        left = left & (at != column)
        inverse = tl.where(left, inverse - own * own, 1.0)
        gram -= 2.0 * own * change
        # The next removals read these rows in other threads than those that wrote them.
        tl.debug_barrier()


def cheapest_removals_triton(
    inverse: Tensor, gram: Tensor, count: int, config: CheapestRemovalsConfig | None = None
) -> tuple[Tensor, Tensor]:
    """The columns that are removed, and their costs, when the cheapest column is removed `count` times.

    Args:
        inverse: [k, k] fp64, A^-1, unit inner stride, k <= MOST_COLUMNS. Element offsets must be below 2^31, because
            the kernel computes them in 32 bits.
        gram: [k, k], M, with the same requirements.
        count: 0 to k.
        config: how rows are read; None for the default.

    Returns:
        The removed columns in order, [count] int64, and the cost of each at its removal, [count] fp64. Ties are broken
        by the lower index. Computed in a fixed order: the same bits every time.
    """
    config = config or CheapestRemovalsConfig()
    columns = len(inverse)
    s, d = torch.empty(2, count, columns, dtype=torch.float64, device=inverse.device).unbind()
    taken = torch.empty(count, dtype=torch.int64, device=inverse.device)
    costs = torch.empty(count, dtype=torch.float64, device=inverse.device)
    if count:
        with device_of(inverse):
            _cheapest_removals_kernel[(1,)](
                inverse,
                gram,
                s,
                d,
                taken,
                costs,
                columns,
                count,
                inverse.stride(0),
                gram.stride(0),
                ROWS=config.ROWS,
                BLOCK=max(32, triton.next_power_of_2(columns)),
                num_warps=config.num_warps,
            )
    return taken, costs
