"""The second stage of every reduction: partial sums and statistics, added in fixed order by one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradprune.kernels.launch import ceil_div, device_of

_BLOCK = 128
_PARTS = 16


@triton.jit(do_not_specialize=["parts", "programs"])
def _add_kernel(
    sums_ptr,
    statistics_ptr,
    sums_out_ptr,
    statistics_out_ptr,
    parts,
    width,
    programs,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Program 0 merges the statistics; each other one adds BLOCK columns of the partial sums, PARTS rows at a time.

    sums_ptr: [parts, width] fp32. statistics_ptr: [programs, 5] fp32: sum|g|, sum g^2, max|g|, min|g|, non-finite.
    sums_out_ptr: [width] fp32. statistics_out_ptr: [5] fp32.
    """
    block = tl.program_id(0)
    if block == 0:
        lanes = tl.arange(0, PARTS * BLOCK)
        added = tl.zeros((PARTS * BLOCK,), tl.float32)
        squares = tl.zeros((PARTS * BLOCK,), tl.float32)
        largest = tl.zeros((PARTS * BLOCK,), tl.float32)
        smallest = tl.full((PARTS * BLOCK,), float("inf"), tl.float32)
        bad = tl.zeros((PARTS * BLOCK,), tl.float32)
        for start in range(0, programs, PARTS * BLOCK):
            inside = start + lanes < programs
            base = statistics_ptr + (start + lanes).to(tl.int64) * 5
            added += tl.load(base, mask=inside, other=0.0)
            squares += tl.load(base + 1, mask=inside, other=0.0)
            largest = tl.maximum(largest, tl.load(base + 2, mask=inside, other=0.0))
            smallest = tl.minimum(smallest, tl.load(base + 3, mask=inside, other=float("inf")))
            bad += tl.load(base + 4, mask=inside, other=0.0)
        tl.store(statistics_out_ptr, tl.sum(added, 0))
        tl.store(statistics_out_ptr + 1, tl.sum(squares, 0))
        tl.store(statistics_out_ptr + 2, tl.max(largest, 0))
        tl.store(statistics_out_ptr + 3, tl.min(smallest, 0))
        tl.store(statistics_out_ptr + 4, tl.sum(bad, 0))
    else:
        columns = (block - 1) * BLOCK + tl.arange(0, BLOCK)
        rows = tl.arange(0, PARTS)
        total = tl.zeros((PARTS, BLOCK), tl.float32)
        for start in range(0, parts, PARTS):
            inside = (start + rows < parts)[:, None] & (columns < width)[None, :]
            at = (start + rows).to(tl.int64)[:, None] * width + columns[None, :]
            total += tl.load(sums_ptr + at, mask=inside, other=0.0)
        tl.store(sums_out_ptr + columns, tl.sum(total, 0), mask=columns < width)


def add_partial_sums(sums: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """The totals of partial results.

    Args:
        sums: [parts, 2, width] fp32, contiguous.
        statistics: [programs, 5] fp32, contiguous: sum|g|, sum g^2, max|g|, min|g|, number of non-finite elements.

    Returns:
        [2, width] and [5], fp32. Over no parts the sums are 0; over no programs the statistics are 0, 0, 0, inf, 0.
    """
    out = torch.empty(*sums.shape[1:], dtype=torch.float32, device=sums.device)
    statistics_out = torch.empty(5, dtype=torch.float32, device=sums.device)
    width = out.numel()
    with device_of(sums):
        _add_kernel[(1 + ceil_div(width, _BLOCK),)](
            sums, statistics, out, statistics_out, len(sums), width, len(statistics), BLOCK=_BLOCK, PARTS=_PARTS
        )
    return out, statistics_out
