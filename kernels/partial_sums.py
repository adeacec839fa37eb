"""The second stage of a kernel's reductions: add partial sums, and merge statistics, in a fixed order.

Programs of the first stage write their partial results to places of their own. Here each program owns some of the
results, reads every partial value of them once, lane by lane in ascending order, and combines its lanes in a tree: no
atomics, so the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradprune.kernels.launch import ceil_div, device_of

_BLOCK = 128
_PARTS = 16
# One program merges up to _ALONE entries of statistics in about the time that another launch takes. More than that are
# first merged by a launch of their own, _ENTRIES per program.
_ALONE, _ENTRIES = 32768, 4096


@triton.jit
def _merge(statistics_ptr, first, end, out_ptr, LANES: tl.constexpr):
    """Merge the entries of statistics from `first` up to, but not including, `end` into one, LANES at a time.

    statistics_ptr: [entries, 5] fp32: sum|g|, sum g^2, max|g|, min|g|, number of non-finite elements.
    out_ptr: [5] fp32, the same of all.
    """
    lanes = tl.arange(0, LANES)
    added = tl.zeros((LANES,), tl.float32)
    squares = tl.zeros((LANES,), tl.float32)
    largest = tl.zeros((LANES,), tl.float32)
    smallest = tl.full((LANES,), float("inf"), tl.float32)
    bad = tl.zeros((LANES,), tl.float32)
    for start in range(first, end, LANES):
        inside = start + lanes < end
        base = statistics_ptr + (start + lanes).to(tl.int64) * 5
        added += tl.load(base, mask=inside, other=0.0)
        squares += tl.load(base + 1, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.load(base + 2, mask=inside, other=0.0))
        smallest = tl.minimum(smallest, tl.load(base + 3, mask=inside, other=float("inf")))
        bad += tl.load(base + 4, mask=inside, other=0.0)
    tl.store(out_ptr, tl.sum(added, 0))
    tl.store(out_ptr + 1, tl.sum(squares, 0))
    tl.store(out_ptr + 2, tl.max(largest, 0))
    tl.store(out_ptr + 3, tl.min(smallest, 0))
    tl.store(out_ptr + 4, tl.sum(bad, 0))


@triton.jit(do_not_specialize=["entries"])
def _merge_kernel(statistics_ptr, out_ptr, entries, ENTRIES: tl.constexpr, LANES: tl.constexpr):
    """Merge the [entries, 5] statistics, ENTRIES per program, into [programs, 5]; fp32."""
    program = tl.program_id(0)
    first = program * ENTRIES
    _merge(statistics_ptr, first, tl.minimum(first + ENTRIES, entries), out_ptr + program * 5, LANES)


@triton.jit(do_not_specialize=["parts", "entries"])
def _add_kernel(
    sums_ptr,
    statistics_ptr,
    sums_out_ptr,
    statistics_out_ptr,
    parts,
    width,
    entries,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Program 0 merges all statistics; each other program adds BLOCK columns of partial sums, PARTS rows at a time.

    sums_ptr: [parts, width] fp32. statistics_ptr: [entries, 5] fp32.
    sums_out_ptr: [width] fp32. statistics_out_ptr: [5] fp32.
    """
    block = tl.program_id(0)
    if block == 0:
        _merge(statistics_ptr, 0, entries, statistics_out_ptr, PARTS * BLOCK)
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
    """Add the partial sums and merge the statistics of a kernel's programs.

    Args:
        sums: [parts, 2, width] fp32, contiguous.
        statistics: [entries, 5] fp32, contiguous: sum|g|, sum g^2, max|g|, min|g|, number of non-finite elements.

    This takes one launch, or two if there are many statistics, because a single program would read them for longer than
    all others read the sums.

    Returns:
        The sums [2, width] and the statistics [5], fp32. Without parts the sums are 0; without entries the statistics
        are 0, 0, 0, inf, 0.
    """
    out = torch.empty(*sums.shape[1:], dtype=torch.float32, device=sums.device)
    statistics_out = torch.empty(5, dtype=torch.float32, device=sums.device)
    width = out.numel()
    with device_of(sums):
        if len(statistics) > _ALONE:
            merged = torch.empty(ceil_div(len(statistics), _ENTRIES), 5, dtype=torch.float32, device=sums.device)
            _merge_kernel[(len(merged),)](statistics, merged, len(statistics), ENTRIES=_ENTRIES, LANES=_PARTS * _BLOCK)
            statistics = merged
        _add_kernel[(1 + ceil_div(width, _BLOCK),)](
            sums, statistics, out, statistics_out, len(sums), width, len(statistics), BLOCK=_BLOCK, PARTS=_PARTS
        )
    return out, statistics_out
