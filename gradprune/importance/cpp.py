"""The importance ops in C++, for CPU tensors."""

import torch
from torch import Tensor

from gradprune.gradients.cpp import check_tensor, dtype_code, require_extension
from gradprune.importance.reference import merge_statistics
from gradprune.importance.vectors import STATISTICS, ImportanceVectors

# A block of the gradient's rows, fp32: small enough to be still in cache when it is scored, large enough for the
# matrix product that makes it to run at full speed.
BLOCK_BYTES = 4 << 20


def taylor_score_cpp(w: Tensor, g: Tensor, isa: str = "auto") -> ImportanceVectors:
    """Row and column sums of |w g|, w g and w^2 g^2, and the statistics of g, from one read of each.

    Args:
        w: [O, I] CPU tensor, fp32, bf16, fp16 or fp64, the weight.
        g: [O, I] the same, of any of these types, its gradient. A tensor whose elements do not follow each other
            along a row is copied, and so is the fp64 one of a pair of which only one is.
        isa: instruction set, "auto" or one of `_C.build_info()["isas"]`. Results differ between them by rounding.

    Sums of at most 128 rows and 4096 columns in fp32, over those in fp64 (all fp64 where both are fp64).
    Deterministic: the same bits for any number of threads.

    Raises:
        BackendUnavailableError: the extension is not built, or the CPU lacks `isa`.
        ValueError: a tensor is not a floating-point CPU matrix, or the shapes differ; names it.
    """
    w, g = check_tensor("w", w), check_tensor("g", g)
    if w.ndim != 2:
        raise ValueError(f"w: has shape {tuple(w.shape)}; a matrix [O, I] is needed")
    if g.shape != w.shape:
        raise ValueError(f"g: has shape {tuple(g.shape)}; w has {tuple(w.shape)}, and both must be the same")
    dtype = torch.float64 if w.dtype == g.dtype == torch.float64 else torch.float32
    rows, columns = w.new_empty((3, w.shape[0]), dtype=dtype), w.new_empty((3, w.shape[1]), dtype=dtype)
    vectors = _vectors(rows, columns, w.new_empty(len(STATISTICS), dtype=dtype))
    if (w.dtype == torch.float64) != (g.dtype == torch.float64):
        w, g = w.to(torch.float32), g.to(torch.float32)
    require_extension(isa)
    outputs = [getattr(vectors, name).data_ptr() for name in ImportanceVectors.__annotations__]
    _call(_unit_stride_rows(w), _unit_stride_rows(g), outputs, isa)
    return vectors


def linear_importance_cpp(x: Tensor, dy: Tensor, w: Tensor) -> ImportanceVectors:
    """`taylor_score` of each sample's weight gradient g_n = dy_n^T x_n of a linear layer, summed over samples.

    Args:
        x: [N, T, I] CPU tensor, fp32, bf16, fp16 or fp64, the layer's input.
        dy: [N, T, O] the same, the gradient of each sample's loss at the layer's output.
        w: [O, I] the same, the weight.

    The gradient is formed by `torch.mm` in fp32 (fp64 where all are fp64), a block of rows of one sample at a time,
    and scored while it is in cache. Sums over blocks and samples are in fp64. Deterministic for a given number of
    threads, as far as `torch.mm` is.

    Raises:
        BackendUnavailableError: the extension is not built.
        ValueError: a tensor is not a floating-point CPU tensor, or the shapes do not fit; names it.
    """
    x, dy, w = check_tensor("x", x), check_tensor("dy", dy), check_tensor("w", w)
    _check_linear_shapes(x, dy, w)
    require_extension()
    double = x.dtype == dy.dtype == w.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    if not double and w.dtype == torch.float64:
        w = w.to(dtype)
    return _score_blockwise(x.to(dtype), dy.to(dtype), _unit_stride_rows(w), dtype)


def _call(w: Tensor, g: Tensor, outputs: list[int], isa: str) -> None:
    """The extension's `taylor_score` of matrices it can read; outputs: the addresses of the seven results."""
    from gradprune import _C

    _C.taylor_score(
        (w.data_ptr(), w.stride(0), dtype_code(w.dtype)),
        (g.data_ptr(), g.stride(0), dtype_code(g.dtype)),
        w.shape[0],
        w.shape[1],
        outputs,
        torch.get_num_threads(),
        isa,
    )


def _score_blockwise(x: Tensor, dy: Tensor, w: Tensor, dtype: torch.dtype) -> ImportanceVectors:
    """Sums of `taylor_score` over samples, a block of rows of one sample's gradient at a time."""
    (samples, _, columns), rows = x.shape, w.shape[0]
    block = max(1, BLOCK_BYTES // (max(columns, 1) * dtype.itemsize))
    starts = range(0, rows, block)
    gradient = w.new_empty((min(block, rows), columns), dtype=dtype)
    of_rows = w.new_empty((samples, 3, rows), dtype=dtype)
    of_columns = w.new_empty((samples, len(starts), 3, columns), dtype=dtype)
    statistics = w.new_empty((samples, len(starts), len(STATISTICS)), dtype=dtype)
    row_address, column_address, statistics_address = (t.data_ptr() for t in (of_rows, of_columns, statistics))
    size = dtype.itemsize
    for n in range(samples):
        for k, first in enumerate(starts):
            part = w[first : first + block]
            g = torch.mm(dy[n, :, first : first + block].T, x[n], out=gradient[: len(part)])
            to_rows = row_address + (n * 3 * rows + first) * size
            to_columns = column_address + (n * len(starts) + k) * 3 * columns * size
            to_statistics = statistics_address + (n * len(starts) + k) * len(STATISTICS) * size
            _call(
                part,
                g,
                [to_rows + s * rows * size for s in range(3)]
                + [to_columns + s * columns * size for s in range(3)]
                + [to_statistics],
                "auto",
            )
    nothing = torch.tensor([[0.0, 0.0, 0.0, torch.inf, 0.0]], dtype=torch.float64)
    return _vectors(
        of_rows.sum(0, dtype=torch.float64).to(dtype),
        of_columns.sum((0, 1), dtype=torch.float64).to(dtype),
        merge_statistics(torch.cat([nothing, statistics.flatten(0, 1).double()])).to(dtype),
    )


def _vectors(rows: Tensor, columns: Tensor, statistics: Tensor) -> ImportanceVectors:
    """Views of rows: [3, O] and columns: [3, I], the sums of |w g|, w g and w^2 g^2."""
    return ImportanceVectors(rows[0], rows[1], rows[2], columns[0], columns[1], columns[2], statistics)


def _check_linear_shapes(x: Tensor, dy: Tensor, w: Tensor) -> None:
    if w.ndim != 2:
        raise ValueError(f"w: has shape {tuple(w.shape)}; a matrix [O, I] is needed")
    if x.ndim != 3 or x.shape[2] != w.shape[1]:
        raise ValueError(f"x: has shape {tuple(x.shape)}; [N, T, {w.shape[1]}] is needed, for w {tuple(w.shape)}")
    if dy.shape != (*x.shape[:2], w.shape[0]):
        raise ValueError(f"dy: has shape {tuple(dy.shape)}; {(*x.shape[:2], w.shape[0])} is needed")


def _unit_stride_rows(matrix: Tensor) -> Tensor:
    """`matrix` itself where its elements follow each other along a row, else a copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()
