"""`linear_importance`: each sample's weight gradient of a linear layer, scored in registers and never written.

A GEMM whose epilogue scores the product: for each sample n, g_n = a_n^T b_n over its tokens, then the sums of |w g_n|
and of w^2 g_n^2 along the rows of g_n, and statistics of g_n. The side that is asked for becomes the rows of the tiles,
so that every sum runs along a tile's rows and stays within a warp:

    rows:    G   = dY^T X    a = dY [N, T, O]   b = X  [N, T, I]   w = W   [O, I]
    columns: G^T = X^T dY    a = X  [N, T, I]   b = dY [N, T, O]   w = W^T [I, O]

In the names below, A and B are the widths of a and b, and a tile is a part of the [A, B] product.

A program owns one BLOCK_A x BLOCK_B tile and a part of the samples, which it takes one after the other: squares are
taken sample by sample, so the tokens of several samples cannot be multiplied together as in the weight-gradient GEMM of
a backward pass. It reads its columns of a and b once, and its tile of W once per sample; over all programs, a is read
B / BLOCK_B times and b A / BLOCK_A times, mostly from the L2 cache. Of the tile it writes 2 fp32 sums per row and 5
statistics per STATISTICS_ROWS rows, added over its samples. `add_partial_sums` adds those of all programs in a second
launch.

The result is deterministic: each partial result has a place of its own in the workspace (no atomics), and both stages
add in a fixed order. Among configurations that are chosen by time, this order is the same.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gradprune.kernels.launch import ceil_div, device_of
from gradprune.kernels.partial_sums import add_partial_sums
from gradprune.kernels.tuning import fastest

# Rows of a tile that share one entry of statistics: as many as a warp holds after a half-precision product on Hopper,
# so that combining them needs no other warp.
STATISTICS_ROWS = 16
# The most bytes of partial sums. If every sample's own would be more, a program takes several samples one after the
# other and adds their sums in registers.
WORKSPACE = 64 << 20


@dataclass(frozen=True)
class LinearImportanceConfig:
    """How the product is divided into tiles, and how the kernel is compiled.

    A program computes a tile of BLOCK_A x BLOCK_B, BLOCK_T tokens at a time. Consecutive programs go down GROUP_A rows
    of tiles before they move to the next column, so that programs that run at the same time share their inputs in the
    L2 cache.

    BLOCK_A, BLOCK_B, BLOCK_T and num_warps determine the order of summation; the other fields change no bit of the
    result.

    maxnreg: the largest number of registers per thread; None leaves it to the compiler.
    persistent: launch one program per multiprocessor, which loops over tiles and samples. This needs descriptors, and
        every sample gets partial sums of its own, even if they exceed WORKSPACE.
    """

    BLOCK_A: int
    BLOCK_B: int
    BLOCK_T: int
    GROUP_A: int = 8
    num_warps: int = 8
    num_stages: int = 3
    maxnreg: int | None = None
    persistent: bool = False

    @cached_property
    def launched_with(self) -> dict[str, int | None]:
        """The keyword arguments of every launch; `persistent` is none of them, because it selects the kernel."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "persistent"}


@triton.jit
def tile_of_program(A, B, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, GROUP_A: tl.constexpr):
    """The row and the column of this program's tile, counted in tiles."""
    return _tile_at(tl.program_id(0), A, B, BLOCK_A, BLOCK_B, GROUP_A)


@triton.jit
def _tile_at(place, A, B, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, GROUP_A: tl.constexpr):
    """The row and the column of tile number `place`: down GROUP_A rows of tiles first, then to the next column."""
    tiles_a = tl.cdiv(A, BLOCK_A)
    tiles_b = tl.cdiv(B, BLOCK_B)
    group = place // (GROUP_A * tiles_b)
    height = tl.minimum(tiles_a - group * GROUP_A, GROUP_A)
    within = place % (GROUP_A * tiles_b)
    return group * GROUP_A + within % height, within // height


@triton.jit
def _product_by_descriptors(
    a_desc, b_desc, n, row, column, T, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr
):
    """The tile of a_n^T b_n that starts at `row` and `column`, [BLOCK_A, BLOCK_B] fp32.

    Elements outside the tensors, and tokens beyond T, are read as zeros, never as those of the next sample.
    """
    g = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for start in range(0, T, BLOCK_T):
        a = a_desc.load([n, start, row]).reshape(BLOCK_T, BLOCK_A)
        b = b_desc.load([n, start, column]).reshape(BLOCK_T, BLOCK_B)
        g = tl.dot(a.T, b, g, input_precision="ieee")
    return g


@triton.jit
def product_by_pointers(
    a_ptr,
    b_ptr,
    rows,
    columns,
    A,
    B,
    T,
    stride_at,
    stride_bt,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The tile of one sample's a^T b at `rows` and `columns`, [BLOCK_A, BLOCK_B] fp32.

    a_ptr: [T, A] and b_ptr: [T, B] point at the sample's first token; unit inner stride.
    """
    tokens = tl.arange(0, BLOCK_T)
    a_ptrs = a_ptr + tokens.to(tl.int64)[None, :] * stride_at + rows[:, None]
    b_ptrs = b_ptr + tokens.to(tl.int64)[:, None] * stride_bt + columns[None, :]
    g = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for start in range(0, T, BLOCK_T):
        in_tokens = start + tokens < T
        a = tl.load(a_ptrs, mask=in_tokens[None, :] & (rows < A)[:, None], other=0.0)
        b = tl.load(b_ptrs, mask=in_tokens[:, None] & (columns < B)[None, :], other=0.0)
        g = tl.dot(a, b, g, input_precision="ieee")
        a_ptrs += tl.full((), BLOCK_T, tl.int64) * stride_at
        b_ptrs += tl.full((), BLOCK_T, tl.int64) * stride_bt
    return g


@triton.jit
def weight_tile(
    w, row, column, A, B, stride_w, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The tile of w that starts at `row` and `column`, [BLOCK_A, BLOCK_B] fp32, with zeros outside w.

    w: a descriptor (DESCRIPTORS) or a pointer. COLUMNS: the tile is one of W^T, and memory holds W, [B, A].
    """
    if DESCRIPTORS:
        tile = w.load([column, row]).T if COLUMNS else w.load([row, column])
    else:
        rows = (row + tl.arange(0, BLOCK_A))[:, None]
        columns = (column + tl.arange(0, BLOCK_B))[None, :]
        outer, inner = (columns, rows) if COLUMNS else (rows, columns)
        tile = tl.load(w + outer.to(tl.int64) * stride_w + inner, mask=(rows < A) & (columns < B), other=0.0)
    return tile.to(tl.float32)


@triton.jit(do_not_specialize=["N", "T", "samples_per_program"])
def _linear_importance_kernel(
    a,
    b,
    w,
    sums_ptr,
    statistics_ptr,
    N,
    T,
    A,
    B,
    samples_per_program,
    stride_an,
    stride_at,
    stride_bn,
    stride_bt,
    stride_w,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_A: tl.constexpr,
    STATISTICS_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Compute and score one tile of g_n = a_n^T b_n for samples_per_program samples n, one after the other.

    Grid: (tiles, parts of the samples). fp32 accumulation in a fixed order, no atomics; g_n is not written. Elements
    are not tested for being finite: one that is not makes sums non-finite, and `_recount_kernel` then corrects the
    statistics.

    a: [N, T, A], b: [N, T, B], w: [A, B]: tensor descriptors (DESCRIPTORS), or pointers to tensors of unit inner
        stride.
    sums_ptr: [parts, columns of tiles, 2, A] fp32, sums over the tile's columns of |w g| and of w^2 g^2.
    statistics_ptr: [parts, tiles, BLOCK_A / STATISTICS_ROWS, 5] fp32: sum|g|, sum g^2, max|g|, min|g|, 0.
    COLUMNS: w is W^T, and memory holds W, [B, A]. TAIL: some tiles extend beyond A or B.
    """
    tile_a, tile_b = tile_of_program(A, B, BLOCK_A, BLOCK_B, GROUP_A)
    row = tile_a * BLOCK_A
    column = tile_b * BLOCK_B
    part = tl.program_id(1)
    rows = row + tl.arange(0, BLOCK_A)
    columns = column + tl.arange(0, BLOCK_B)
    GROUPS: tl.constexpr = BLOCK_A // STATISTICS_ROWS
    row_abs = tl.zeros((BLOCK_A,), tl.float32)
    row_square = tl.zeros((BLOCK_A,), tl.float32)
    sum_abs = tl.zeros((GROUPS,), tl.float32)
    sum_square = tl.zeros((GROUPS,), tl.float32)
    max_abs = tl.zeros((GROUPS,), tl.float32)
    min_abs = tl.full((GROUPS,), float("inf"), tl.float32)
    first = part * samples_per_program
    for n in range(first, tl.minimum(first + samples_per_program, N)):
        if DESCRIPTORS:
            g = _product_by_descriptors(a, b, n, row, column, T, BLOCK_A, BLOCK_B, BLOCK_T)
        else:
            sample = tl.cast(n, tl.int64)
            g = product_by_pointers(
                a + sample * stride_an, b + sample * stride_bn, rows, columns, A, B, T, stride_at, stride_bt,
                BLOCK_A, BLOCK_B, BLOCK_T,
            )  # fmt: skip
        of_rows_abs, of_rows_square, of_abs, of_square, of_max, of_min = _scores(
            g, w, row, column, A, B, stride_w, BLOCK_A, BLOCK_B, GROUPS, COLUMNS, DESCRIPTORS, TAIL
        )
        row_abs += of_rows_abs
        row_square += of_rows_square
        sum_abs += of_abs
        sum_square += of_square
        max_abs = tl.maximum(max_abs, of_max)
        min_abs = tl.minimum(min_abs, of_min)
    _store_scores(
        sums_ptr, statistics_ptr, part, tile_a, tile_b, tl.num_programs(0), A, B, row_abs, row_square, sum_abs,
        sum_square, max_abs, min_abs, BLOCK_A, BLOCK_B, GROUPS,
    )  # fmt: skip


@triton.jit
def _scores(
    g, w, row, column, A, B, stride_w, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Score one sample's tile g.

    Returns the sums of |w g| and of w^2 g^2 of each row, [BLOCK_A], and sum|g|, sum g^2, max|g| and min|g| of each of
    GROUPS groups of rows, [GROUPS].
    """
    ROWS: tl.constexpr = BLOCK_A // GROUPS
    magnitude = tl.abs(g)
    sum_abs = tl.sum(tl.sum(magnitude, 1).reshape(GROUPS, ROWS), 1)
    sum_square = tl.sum(tl.sum(g * g, 1).reshape(GROUPS, ROWS), 1)
    max_abs = tl.max(tl.max(magnitude, 1).reshape(GROUPS, ROWS), 1)
    if TAIL:
        inside = (row + tl.arange(0, BLOCK_A) < A)[:, None] & (column + tl.arange(0, BLOCK_B) < B)[None, :]
        magnitude = tl.where(inside, magnitude, float("inf"))
    min_abs = tl.min(tl.min(magnitude, 1).reshape(GROUPS, ROWS), 1)
    product = weight_tile(w, row, column, A, B, stride_w, BLOCK_A, BLOCK_B, COLUMNS, DESCRIPTORS) * g
    return tl.sum(tl.abs(product), 1), tl.sum(product * product, 1), sum_abs, sum_square, max_abs, min_abs


@triton.jit
def _store_scores(
    sums_ptr, statistics_ptr, part, tile_a, tile_b, tiles, A, B, row_abs, row_square, sum_abs, sum_square, max_abs,
    min_abs, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Write a tile's row sums and the statistics of its groups of rows, for part number `part` of the samples."""
    rows = tile_a * BLOCK_A + tl.arange(0, BLOCK_A)
    sums = sums_ptr + (part.to(tl.int64) * tl.cdiv(B, BLOCK_B) + tile_b) * 2 * A + rows
    tl.store(sums, row_abs, mask=rows < A)
    tl.store(sums + A, row_square, mask=rows < A)
    tile = part.to(tl.int64) * tiles + tile_a * tl.cdiv(B, BLOCK_B) + tile_b
    statistics = statistics_ptr + (tile * GROUPS + tl.arange(0, GROUPS)) * 5
    tl.store(statistics, sum_abs)
    tl.store(statistics + 1, sum_square)
    tl.store(statistics + 2, max_abs)
    tl.store(statistics + 3, min_abs)
    tl.store(statistics + 4, tl.zeros((GROUPS,), tl.float32))


@triton.jit(do_not_specialize=["N", "T"])
def _persistent_linear_importance_kernel(
    a,
    b,
    w,
    sums_ptr,
    statistics_ptr,
    N,
    T,
    A,
    B,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_A: tl.constexpr,
    STATISTICS_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """`_linear_importance_kernel` as a persistent kernel: each program loops over tiles and samples.

    Grid: (programs,); tile and sample number `item` belongs to program item % programs. The compiler flattens the loops
    over items and tokens into one, so that the first loads of a tile overlap the epilogue of the tile before. a, b and
    w are descriptors, and each sample has its own partial sums.
    """
    GROUPS: tl.constexpr = BLOCK_A // STATISTICS_ROWS
    tiles = tl.cdiv(A, BLOCK_A) * tl.cdiv(B, BLOCK_B)
    for item in tl.range(tl.program_id(0), tiles * N, tl.num_programs(0), flatten=True):
        tile_a, tile_b = _tile_at(item % tiles, A, B, BLOCK_A, BLOCK_B, GROUP_A)
        row, column, n = tile_a * BLOCK_A, tile_b * BLOCK_B, item // tiles
        g = _product_by_descriptors(a, b, n, row, column, T, BLOCK_A, BLOCK_B, BLOCK_T)
        row_abs, row_square, sum_abs, sum_square, max_abs, min_abs = _scores(
            g, w, row, column, A, B, 0, BLOCK_A, BLOCK_B, GROUPS, COLUMNS, True, TAIL
        )
        _store_scores(
            sums_ptr, statistics_ptr, n, tile_a, tile_b, tiles, A, B, row_abs, row_square, sum_abs, sum_square, max_abs,
            min_abs, BLOCK_A, BLOCK_B, GROUPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "T", "samples_per_program", "tiles_b", "per_tile"])
def _recount_kernel(
    a_ptr,
    b_ptr,
    statistics_ptr,
    N,
    T,
    A,
    B,
    samples_per_program,
    tiles_b,
    per_tile,
    stride_an,
    stride_at,
    stride_bn,
    stride_bt,
    TILE_A: tl.constexpr,
    TILE_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Recompute the statistics of a row of tiles if any of its sums of |g| is not finite; otherwise do nothing.

    Grid: (rows of tiles, parts of the samples). Usually a program only reads the sums of |g|. The rest is the error
    path, written to be simple, not fast: the products are formed again. The first entry of each tile is then
    overwritten with the statistics of its finite elements and the number of non-finite ones, its other entries with the
    statistics of no elements.

    statistics_ptr: [parts, rows of tiles, tiles_b, per_tile, 5] fp32, as `_linear_importance_kernel` has written them
        for tiles of TILE_A x TILE_B; per_tile is BLOCK_A / STATISTICS_ROWS.
    """
    tile_a = tl.program_id(0)
    part = tl.program_id(1)
    base = statistics_ptr + (part.to(tl.int64) * tl.num_programs(0) + tile_a) * tiles_b * per_tile * 5
    lanes = tl.arange(0, SCAN)
    bad = tl.zeros((SCAN,), tl.float32)
    for start in range(0, tiles_b * per_tile, SCAN):
        entries = start + lanes
        found = tl.load(base + entries.to(tl.int64) * 5, mask=entries < tiles_b * per_tile, other=0.0)
        bad += tl.where(found < float("inf"), 0.0, 1.0)  # false for NaN too
    if tl.sum(bad, 0) > 0:
        for tile_b in range(0, tiles_b):
            _recount_tile(
                a_ptr, b_ptr, base + tl.cast(tile_b, tl.int64) * per_tile * 5, part, tile_a * TILE_A, tile_b * TILE_B,
                N, T, A, B, samples_per_program, per_tile, stride_an, stride_at, stride_bn, stride_bt,
                TILE_A, TILE_B, BLOCK_T,
            )  # fmt: skip


@triton.jit
def add_statistics(g, inside, sum_abs, sum_square, max_abs, min_abs, others):
    """Return a tile's statistics by row, [TILE_A] each, updated with one sample's gradient g [TILE_A, TILE_B].

    inside: [TILE_A, TILE_B], the elements that belong to the matrix. others: the number of non-finite elements.
    """
    magnitude = tl.abs(g)
    finite = (magnitude < float("inf")) & inside  # false for NaN too
    clean = tl.where(finite, magnitude, 0.0)
    sum_abs += tl.sum(clean, 1)
    sum_square += tl.sum(clean * clean, 1)
    max_abs = tl.maximum(max_abs, tl.max(clean, 1))
    min_abs = tl.minimum(min_abs, tl.min(tl.where(finite, magnitude, float("inf")), 1))
    others += tl.sum(tl.where(inside & (finite == 0), 1.0, 0.0), 1)
    return sum_abs, sum_square, max_abs, min_abs, others


@triton.jit
def store_statistics(statistics, sum_abs, sum_square, max_abs, min_abs, others):
    """Combine a tile's statistics over its rows and write them."""
    tl.store(statistics, tl.sum(sum_abs, 0))
    tl.store(statistics + 1, tl.sum(sum_square, 0))
    tl.store(statistics + 2, tl.max(max_abs, 0))
    tl.store(statistics + 3, tl.min(min_abs, 0))
    tl.store(statistics + 4, tl.sum(others, 0))


@triton.jit
def _recount_tile(
    a_ptr, b_ptr, statistics, part, row, column, N, T, A, B, samples_per_program, per_tile,
    stride_an, stride_at, stride_bn, stride_bt,
    TILE_A: tl.constexpr, TILE_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Recompute and write the statistics of one tile's finite elements, and the number of its non-finite ones."""
    rows = row + tl.arange(0, TILE_A)
    columns = column + tl.arange(0, TILE_B)
    inside = (rows < A)[:, None] & (columns < B)[None, :]
    sum_abs = tl.zeros((TILE_A,), tl.float32)
    sum_square = tl.zeros((TILE_A,), tl.float32)
    max_abs = tl.zeros((TILE_A,), tl.float32)
    min_abs = tl.full((TILE_A,), float("inf"), tl.float32)
    others = tl.zeros((TILE_A,), tl.float32)
    first = part * samples_per_program
    for n in range(first, tl.minimum(first + samples_per_program, N)):
        sample = tl.cast(n, tl.int64)
        g = product_by_pointers(
            a_ptr + sample * stride_an, b_ptr + sample * stride_bn, rows, columns, A, B, T, stride_at, stride_bt,
            TILE_A, TILE_B, BLOCK_T,
        )  # fmt: skip
        sum_abs, sum_square, max_abs, min_abs, others = add_statistics(
            g, inside, sum_abs, sum_square, max_abs, min_abs, others
        )
    for entry in range(1, per_tile):
        tl.store(statistics + entry * 5, 0.0)
        tl.store(statistics + entry * 5 + 1, 0.0)
        tl.store(statistics + entry * 5 + 2, 0.0)
        tl.store(statistics + entry * 5 + 3, float("inf"))
    store_statistics(statistics, sum_abs, sum_square, max_abs, min_abs, others)


# None of these spills a register when compiled for sm_80, sm_90, sm_100 and sm_120, as far as they run there; none has
# been timed on a GPU.
#
# With descriptors and 3 stages, a block takes 96 KiB of shared memory and 128 registers per thread: two blocks fit on
# an SM, and one computes products during the other's epilogue. With 4 stages only one fits, with more loads in flight.
_DESCRIPTORS = (
    LinearImportanceConfig(BLOCK_A=128, BLOCK_B=128, BLOCK_T=64, maxnreg=128),
    LinearImportanceConfig(BLOCK_A=128, BLOCK_B=128, BLOCK_T=64, GROUP_A=16, maxnreg=128),
    LinearImportanceConfig(BLOCK_A=128, BLOCK_B=128, BLOCK_T=64, num_stages=4),
)
# Where operands have to be in registers, 128 registers would spill, and an SM has only 100 KiB of shared memory.
_DESCRIPTORS_FROM_REGISTERS = (
    LinearImportanceConfig(BLOCK_A=128, BLOCK_B=128, BLOCK_T=64),
    LinearImportanceConfig(BLOCK_A=128, BLOCK_B=128, BLOCK_T=64, GROUP_A=16),
    LinearImportanceConfig(BLOCK_A=128, BLOCK_B=128, BLOCK_T=64, num_stages=4),
)
# The next tile's loads overlap a tile's epilogue. Only the sweep measures it: its wider tiles add in another order than
# the other configurations, so it may not be chosen by time. Triton 3.6.0 gives it 168 to 180 registers; Triton 3.9.0
# spills two registers in the kernel by rows.
PERSISTENT = LinearImportanceConfig(BLOCK_A=128, BLOCK_B=256, BLOCK_T=64, persistent=True)
# Pointers take registers, and most of them if a width is not a multiple of 16, because elements are then loaded one by
# one.
_POINTERS = (LinearImportanceConfig(BLOCK_A=128, BLOCK_B=64, BLOCK_T=64),)
_POINTERS_RAGGED = (LinearImportanceConfig(BLOCK_A=64, BLOCK_B=64, BLOCK_T=32),)
# Without maxnreg, Triton 3.6 limits itself to 128 registers here and spills two; with less than 200, 3.9 spills on
# sm_80.
_FP32 = (LinearImportanceConfig(BLOCK_A=128, BLOCK_B=64, BLOCK_T=16, maxnreg=208),)
_FP32_RAGGED = (LinearImportanceConfig(BLOCK_A=64, BLOCK_B=32, BLOCK_T=16, num_stages=1),)
_RECOUNT = {"BLOCK_T": 16, "SCAN": 256}


def configs_for(
    A: int, B: int, dtype: torch.dtype, descriptors: bool, from_registers: bool = False
) -> tuple[LinearImportanceConfig, ...]:
    """The configurations for a product [A, B] of inputs of `dtype`: the default first; all give the same bits.

    from_registers: whether the GPU multiplies as `multiplies_from_registers` says; it matters with descriptors only.
    """
    ragged = bool(A % 16 or B % 16)
    if descriptors:
        return _DESCRIPTORS_FROM_REGISTERS if from_registers else _DESCRIPTORS
    if dtype == torch.float32:
        return _FP32_RAGGED if ragged else _FP32
    return _POINTERS_RAGGED if ragged else _POINTERS


def linear_importance_triton(
    x: Tensor,
    dy: Tensor,
    w: Tensor,
    columns: bool,
    config: LinearImportanceConfig | None = None,
    counted: bool = True,
) -> tuple[Tensor, Tensor]:
    """Row (or column) sums and statistics of each sample's weight gradient g_n = dy_n^T x_n, summed over samples.

    The gradient is formed and scored in registers, in fp32 (fp32 inputs are multiplied in fp32, not in TF32), and never
    written. The programs' partial sums, at most 64 MiB unless those of one sample are more, are added by a second
    launch in a fixed order: the same bits every time.

    Args:
        x: [N, T, I] fp32, bf16 or fp16, unit inner stride, the layer's input.
        dy: [N, T, O] same dtype, unit inner stride, the gradient of each sample's loss with respect to the output.
        w: [O, I] fp32, bf16 or fp16, unit inner stride, the weight.
        columns: return column sums (over the rows of each column) instead of row sums.
        config: how the product is divided into tiles; None for the fastest of `configs_for`.
        counted: count non-finite elements, by computing a gradient again if a sum of its magnitudes is not finite.

    Returns:
        [2, O] (with `columns` [2, I]) fp32, sums of |w g_n| and of w^2 g_n^2, non-finite where an element of g_n is;
        and [5] fp32, statistics of all g_n: sum|g|, sum g^2, max|g|, min|g| of the finite elements, and the number of
        non-finite elements. If not `counted`, this number is 0, and non-finite elements make the sums non-finite.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        # Triton's interpreter, the only way to run on the CPU, would multiply bf16's bit patterns as integers. fp32
        # represents bf16 exactly.
        x, dy = x.float(), dy.float()
    a, b = (x, dy) if columns else (dy, x)
    descriptors = descriptors_work(x, dy, w)
    if config is None:
        configs = configs_for(a.shape[2], b.shape[2], x.dtype, descriptors, multiplies_from_registers(w.device))
    else:
        configs = (config,)
    with device_of(w):
        chosen = fastest(
            configs, lambda entry: _launch(a, b, w, columns, descriptors, entry), x, a.shape, b.shape[2], descriptors
        )
        sums, statistics = _launch(a, b, w, columns, descriptors, chosen)
        if counted and len(statistics):
            _recount(a, b, statistics, chosen)
        return add_partial_sums(sums, statistics)


def _launch(
    a: Tensor, b: Tensor, w: Tensor, columns: bool, descriptors: bool, config: LinearImportanceConfig
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; return partial sums [parts * columns of tiles, 2, A] and statistics [entries, 5]."""
    samples, tokens, height = a.shape
    width = b.shape[2]
    tiles_a, tiles_b = ceil_div(height, config.BLOCK_A), ceil_div(width, config.BLOCK_B)
    in_turn = _in_turn(config, samples, tiles_b, height)
    parts = ceil_div(samples, in_turn)
    per_tile = config.BLOCK_A // STATISTICS_ROWS
    sums = torch.empty(parts * tiles_b, 2, height, dtype=torch.float32, device=w.device)
    statistics = torch.empty(parts * tiles_a * tiles_b * per_tile, 5, dtype=torch.float32, device=w.device)
    if not len(statistics):
        return sums, statistics
    strides = (a.stride(0), a.stride(1), b.stride(0), b.stride(1))
    inputs: tuple[Any, Any, Any] = _describe(a, b, w, columns, config) if descriptors else (a, b, w)
    if config.persistent and descriptors:
        _launch_persistent(inputs, sums, statistics, (samples, tokens, height, width), columns, config)
        return sums, statistics
    _linear_importance_kernel[(tiles_a * tiles_b, parts)](
        *inputs,
        sums,
        statistics,
        samples,
        tokens,
        height,
        width,
        in_turn,
        *strides,
        w.stride(0),
        STATISTICS_ROWS=STATISTICS_ROWS,
        COLUMNS=columns,
        DESCRIPTORS=descriptors,
        TAIL=bool(height % config.BLOCK_A or width % config.BLOCK_B),
        **config.launched_with,
    )
    return sums, statistics


def _launch_persistent(
    inputs: tuple[Any, Any, Any],
    sums: Tensor,
    statistics: Tensor,
    sizes: tuple[int, int, int, int],
    columns: bool,
    config: LinearImportanceConfig,
) -> None:
    """Launch the persistent kernel, which writes to `sums` and `statistics`.

    Args:
        inputs: a, b and w as descriptors.
        sums: see `_launch`.
        statistics: see `_launch`.
        sizes: N, T, A, B.
        columns: see `linear_importance_triton`.
        config: a persistent configuration.
    """
    samples, _, height, width = sizes
    tiles = ceil_div(height, config.BLOCK_A) * ceil_div(width, config.BLOCK_B)
    # The interpreter runs programs one after the other: a few are enough for it.
    at_once = torch.cuda.get_device_properties(sums.device).multi_processor_count if sums.is_cuda else 3
    _persistent_linear_importance_kernel[(min(tiles * samples, at_once),)](
        *inputs,
        sums,
        statistics,
        *sizes,
        STATISTICS_ROWS=STATISTICS_ROWS,
        COLUMNS=columns,
        TAIL=bool(height % config.BLOCK_A or width % config.BLOCK_B),
        **config.launched_with,
    )


def _in_turn(config: LinearImportanceConfig, samples: int, tiles_b: int, height: int) -> int:
    return 1 if config.persistent else samples_in_turn(samples, tiles_b, height)


def _recount(a: Tensor, b: Tensor, statistics: Tensor, config: LinearImportanceConfig) -> None:
    """Correct the statistics of tiles whose sums of |g| are not finite, in place."""
    samples, tokens, height = a.shape
    width = b.shape[2]
    tiles_a, tiles_b = ceil_div(height, config.BLOCK_A), ceil_div(width, config.BLOCK_B)
    in_turn = _in_turn(config, samples, tiles_b, height)
    _recount_kernel[(tiles_a, ceil_div(samples, in_turn))](
        a,
        b,
        statistics,
        samples,
        tokens,
        height,
        width,
        in_turn,
        tiles_b,
        config.BLOCK_A // STATISTICS_ROWS,
        a.stride(0),
        a.stride(1),
        b.stride(0),
        b.stride(1),
        TILE_A=config.BLOCK_A,
        TILE_B=config.BLOCK_B,
        **_RECOUNT,
        num_warps=8,
        num_stages=1,
    )


def samples_in_turn(samples: int, tiles_b: int, height: int) -> int:
    """The number of samples that a program takes one after the other, so that partial sums fit in WORKSPACE."""
    of_sample = tiles_b * 2 * height * torch.float32.itemsize
    at_once = max(1, WORKSPACE // max(1, of_sample))
    return max(1, ceil_div(samples, at_once))


def descriptors_work(*tensors: Tensor) -> bool:
    """Whether all tensors can be read by Hopper's tensor memory accelerator (TMA), which the interpreter emulates."""
    if tensors[0].is_cuda and torch.cuda.get_device_capability(tensors[0].device)[0] < 9:
        return False
    return tensors[0].dtype != torch.float32 and all(map(is_describable, tensors))


def multiplies_from_registers(device: torch.device) -> bool:
    """Whether the tensor cores take both operands from registers, although the GPU has tensor memory accelerators.

    So do the consumer and workstation GPUs of the Blackwell generation, compute capability 12. Hopper's and Blackwell's
    data-centre GPUs take them from shared memory.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 12


def is_describable(tensor: Tensor) -> bool:
    """Whether a tensor is not empty, its rows begin at multiples of 16 bytes, and no stride is 0 or negative."""
    steps = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    return tensor.numel() > 0 and tensor.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def _describe(
    a: Tensor, b: Tensor, w: Tensor, columns: bool, config: LinearImportanceConfig
) -> tuple[object, object, object]:
    tile = [config.BLOCK_B, config.BLOCK_A] if columns else [config.BLOCK_A, config.BLOCK_B]
    return (
        _descriptor(a, [1, config.BLOCK_T, config.BLOCK_A]),
        _descriptor(b, [1, config.BLOCK_T, config.BLOCK_B]),
        _descriptor(w, tile),
    )


def _descriptor(tensor: Tensor, block: list[int]) -> object:
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), block)
