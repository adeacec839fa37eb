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

    A program forms tiles of BLOCK_O x BLOCK_I, BLOCK_T tokens a step; GROUP_O rows of tiles are walked column by
    column, so that programs running at the same time share their inputs in the L2 cache.

    ONE_SAMPLE: a program takes one sample's tile. Otherwise it takes one tile of all samples in turn and sums over them
    in registers: W is read once and the columns are reduced once, but it keeps four fp32 tiles where one sample needs
    one, so its tiles are smaller and the inputs are read more often.
    """

    BLOCK_O: int
    BLOCK_I: int
    BLOCK_T: int
    GROUP_O: int = 8
    ONE_SAMPLE: bool = False
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
def _store_sums(tile, row_ptrs, column_ptrs, in_rows, in_columns):
    """The sums of a tile's rows and of its columns."""
    tl.store(row_ptrs, tl.sum(tile, 1), mask=in_rows)
    tl.store(column_ptrs, tl.sum(tile, 0), mask=in_columns)


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
    N,
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
    ONE_SAMPLE: tl.constexpr,
    HAS_I_TAIL: tl.constexpr,
):
    """One tile of g_n = dy_n^T x_n, of sample program_id(1) or of every sample in turn; scored, not written.

    X [N, T, I], dY [N, T, O] and W [O, I] have unit inner strides. The sums over samples of |w g_n|, w g_n and
    w^2 g_n^2 are |w|, w and w^2 times those of |g_n|, g_n and g_n^2. fp32 accumulation, fixed order, no atomics.

    rows_ptr: [parts, columns of tiles, 3, O] fp32; the tile's sums over its columns of |w g|, w g, w^2 g^2.
    columns_ptr: [parts, rows of tiles, 3, I] fp32; the tile's sums over its rows.
    statistics_ptr: [parts, tiles, 5] fp32: sum|g|, sum g^2, max|g|, min|g|, non-finite count.
    A part is one sample, or all of them. HAS_I_TAIL: I is no multiple of BLOCK_I, and the last tiles reach beyond it.
    """
    tile_o, tile_i = _tile_of_program(O, I, BLOCK_O, BLOCK_I, GROUP_O)
    part = tl.program_id(1).to(tl.int64)
    rows = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    columns = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    in_rows = rows < O
    in_columns = columns < I
    signed = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    absolute = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    square = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    sum_abs = tl.zeros((BLOCK_O,), tl.float32)
    sum_square = tl.zeros((BLOCK_O,), tl.float32)
    max_abs = tl.zeros((BLOCK_O,), tl.float32)
    min_abs = tl.full((BLOCK_O,), float("inf"), tl.float32)
    bad = tl.zeros((BLOCK_O,), tl.float32)
    samples = 1 if ONE_SAMPLE else N
    for sample in range(0, samples):
        n = part + sample
        g = _gradient_tile(
            x_ptr + n * stride_xn, dy_ptr + n * stride_dyn, rows, columns, O, I, T, stride_xt, stride_dyt,
            BLOCK_O, BLOCK_I, BLOCK_T,
        )  # fmt: skip
        magnitude = tl.abs(g)
        if HAS_I_TAIL:
            magnitude = tl.where(in_columns[None, :], magnitude, float("inf"))
        finite = magnitude < float("inf")  # false for NaN too
        clean = tl.where(finite, magnitude, 0.0)
        max_abs = tl.maximum(max_abs, tl.max(clean, 1))
        min_abs = tl.minimum(min_abs, tl.min(tl.where(finite, magnitude, float("inf")), 1))
        bad += tl.sum(tl.where(finite, 0.0, 1.0), 1)
        if ONE_SAMPLE:
            signed = g
            sum_abs = tl.sum(clean, 1)
            sum_square = tl.sum(clean * clean, 1)
        else:
            signed += g
            absolute += clean
            square += clean * clean

    # Beyond the matrix w is 0 and g is 0, or NaN where all of its row or column inside is non-finite.
    inside = in_rows[:, None] & in_columns[None, :]
    w_ptrs = w_ptr + rows.to(tl.int64)[:, None] * stride_wo + columns[None, :]
    w = tl.load(w_ptrs, mask=inside, other=0.0).to(tl.float32)
    row_ptrs = rows_ptr + (part * tl.cdiv(I, BLOCK_I) + tile_i) * 3 * O + rows
    column_ptrs = columns_ptr + (part * tl.cdiv(O, BLOCK_O) + tile_o) * 3 * I + columns
    if ONE_SAMPLE:
        product = w * signed
        _store_sums(tl.abs(product), row_ptrs, column_ptrs, in_rows, in_columns)
        _store_sums(product, row_ptrs + O, column_ptrs + I, in_rows, in_columns)
        _store_sums(product * product, row_ptrs + 2 * O, column_ptrs + 2 * I, in_rows, in_columns)
    else:
        sum_abs = tl.sum(absolute, 1)
        sum_square = tl.sum(square, 1)
        # An element that was ever non-finite has a non-finite signed sum; its row and column are to show it.
        spread = tl.abs(signed)
        finite = spread < float("inf")
        absolute = tl.abs(w) * tl.where(finite, absolute, spread)
        square = w * w * tl.where(finite, square, spread)
        _store_sums(absolute, row_ptrs, column_ptrs, in_rows, in_columns)
        _store_sums(w * signed, row_ptrs + O, column_ptrs + I, in_rows, in_columns)
        _store_sums(square, row_ptrs + 2 * O, column_ptrs + 2 * I, in_rows, in_columns)
    # The columns beyond I were counted too, once a sample.
    beyond = samples * tl.maximum((tile_i + 1) * BLOCK_I - I, 0)
    statistics_base = statistics_ptr + (part * tl.num_programs(0) + tl.program_id(0)) * 5
    _store_statistics(statistics_base, sum_abs, sum_square, max_abs, min_abs, bad - beyond, in_rows)


# Every one compiles without spilled registers for sm_80 and sm_90. None has been timed on a GPU.
_FP32 = LinearImportanceConfig(BLOCK_O=128, BLOCK_I=128, BLOCK_T=16, ONE_SAMPLE=True)
_FP32_RAGGED = LinearImportanceConfig(BLOCK_O=64, BLOCK_I=128, BLOCK_T=16, ONE_SAMPLE=True)
_HALF = LinearImportanceConfig(BLOCK_O=128, BLOCK_I=128, BLOCK_T=64, ONE_SAMPLE=True, num_stages=4)
_HALF_ALL_SAMPLES = LinearImportanceConfig(BLOCK_O=128, BLOCK_I=64, BLOCK_T=64, num_stages=4)
_HALF_RAGGED = LinearImportanceConfig(BLOCK_O=64, BLOCK_I=128, BLOCK_T=32, ONE_SAMPLE=True)


def config_for(N: int, T: int, O: int, I: int, dtype: torch.dtype) -> LinearImportanceConfig:  # noqa: E741
    """The configuration for N samples of T tokens and a gradient [O, I], inputs of `dtype`.

    Where samples are long, larger tiles save more reads of the inputs than reducing each sample costs; short ones are
    summed in registers first. Widths that 16 does not divide are read element by element, which takes registers.
    """
    ragged = bool(O % 16 or I % 16)
    if dtype == torch.float32:
        return _FP32_RAGGED if ragged else _FP32
    if ragged:
        return _HALF_RAGGED
    short = N > 1 and T < 512 and I % _HALF_ALL_SAMPLES.BLOCK_I == 0
    return _HALF_ALL_SAMPLES if short else _HALF


def linear_importance_triton(
    x: Tensor, dy: Tensor, w: Tensor, config: LinearImportanceConfig | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums, column sums and statistics of each sample's weight gradient g_n = dy_n^T x_n, summed over samples.

    The gradient is formed and scored in registers, in fp32 (fp32 inputs are multiplied in fp32, not in TF32), and never
    written. The tiles' partial sums are added by a second, small reduction, in fixed order, so that the result has the
    same bits every time.

    Args:
        x: [N, T, I] fp32, bf16 or fp16, unit inner stride, the layer's input.
        dy: [N, T, O] of the same dtype, unit inner stride, the gradient of each sample's loss at the layer's output.
        w: [O, I] fp32, bf16 or fp16, unit inner stride, the weight.
        config: how the gradient is cut up; by default `config_for` its shape and dtype.

    Returns:
        rows [3, O] and columns [3, I], each sums of |w g_n|, w g_n and w^2 g_n^2, and statistics [5] of all g_n:
        sum|g|, sum g^2, max|g|, min|g|, number of non-finite elements (which enter none of the other four). fp32.
    """
    samples, tokens, width = x.shape
    height = w.shape[0]
    config = config or config_for(samples, tokens, height, width, x.dtype)
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        # Triton's interpreter, the only way to run on the CPU, multiplies the bits of bf16. fp32 holds them exactly.
        x, dy = x.float(), dy.float()
    tiles_o, tiles_i = triton.cdiv(height, config.BLOCK_O), triton.cdiv(width, config.BLOCK_I)
    parts = samples if config.ONE_SAMPLE else min(samples, 1)
    rows = torch.empty(parts * tiles_i, 3, height, dtype=torch.float32, device=w.device)
    columns = torch.empty(parts * tiles_o, 3, width, dtype=torch.float32, device=w.device)
    statistics = torch.empty(parts * tiles_o * tiles_i, 5, dtype=torch.float32, device=w.device)
    if len(statistics):
        _linear_importance_kernel[(tiles_o * tiles_i, parts)](
            x,
            dy,
            w,
            rows,
            columns,
            statistics,
            samples,
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
            ONE_SAMPLE=config.ONE_SAMPLE,
            HAS_I_TAIL=width % config.BLOCK_I != 0,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return rows.sum(0), columns.sum(0), merged_statistics(statistics)
