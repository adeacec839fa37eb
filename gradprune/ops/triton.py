"""The importance ops by Triton kernels, for CUDA tensors (for CPU tensors under Triton's interpreter)."""

import torch
from torch import Tensor

from gradprune.kernels import cheapest_removals as removals_kernel
from gradprune.kernels import grouped_linear_importance as grouped_kernel
from gradprune.kernels import linear_importance as linear_kernel
from gradprune.kernels import mask_gradient as mask_kernel
from gradprune.kernels import taylor_score as taylor_kernel
from gradprune.ops.removals import Removals, cheapest_removals_reference, check_removals
from gradprune.ops.vectors import (
    GradientStatistics,
    GroupedVectors,
    ImportanceVectors,
    MaskGradient,
    Side,
    check_grouped,
    sides,
)

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def taylor_score_triton(w: Tensor, g: Tensor, side: Side = "both") -> ImportanceVectors:
    """Row and column sums of |w g| and w^2 g^2, and the statistics of g, from one read of each.

    Args:
        w: [O, I] fp32, bf16 or fp16, the weight; copied where its inner stride is not 1.
        g: [O, I] the same, its gradient.
        side: which sums to compute.

    Accumulates in fp32 and in fixed order: the same bits every time.

    Raises:
        ValueError: not a matrix, shapes that differ, or an unsupported dtype; names the argument.
    """
    for name, tensor in (("w", w), ("g", g)):
        if tensor.ndim != 2 or tensor.shape != w.shape:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}; w and g are matrices of one shape [O, I]")
        _check_dtype(name, tensor)
    return vectors(*taylor_kernel.taylor_score_triton(_unit_inner_stride(w), _unit_inner_stride(g), *sides(side)))


def linear_importance_triton(
    x: Tensor, dy: Tensor, w: Tensor, side: Side = "both", counted: bool = True
) -> ImportanceVectors:
    """`taylor_score` of each sample's weight gradient g_n = dy_n^T x_n of a linear layer, summed over samples.

    Args:
        x: [N, T, I] fp32, bf16 or fp16, the layer's input.
        dy: [N, T, O] any of these types, the gradient of each sample's loss with respect to the layer's output. If its
            dtype differs from x's, both are converted to the wider one (bf16 and fp16: to fp32).
        w: [O, I] any of these types, the weight.
        side: which sums to compute; "both" computes the gradient twice.
        counted: count non-finite elements, and leave them out of the other statistics; otherwise these are not finite
            where there are any.

    One kernel multiplies and scores; a gradient is never written to memory. A tensor whose inner stride is not 1 is
    copied. Accumulates in fp32 and in fixed order: the same bits every time.

    Raises:
        ValueError: shapes that do not fit, or an unsupported dtype; names the argument.
    """
    if (x.ndim, dy.ndim, w.ndim) != (3, 3, 2) or not {x.dtype, dy.dtype, w.dtype} <= _DTYPES:
        _refuse(x, dy, w)
    if dy.shape[:2] != x.shape[:2]:
        raise ValueError(f"dy: has shape {tuple(dy.shape)}; its samples and tokens must be x's, {tuple(x.shape[:2])}")
    if w.shape != (dy.shape[2], x.shape[2]):
        raise ValueError(f"w: has shape {tuple(w.shape)}; dy and x make it {(dy.shape[2], x.shape[2])}")
    if x.dtype != dy.dtype:
        dtype = torch.promote_types(x.dtype, dy.dtype)
        x, dy = x.to(dtype), dy.to(dtype)
    x, dy, w = _unit_inner_stride(x), _unit_inner_stride(dy), _unit_inner_stride(w)
    rows, columns = sides(side)
    of_rows = linear_kernel.linear_importance_triton(x, dy, w, columns=False, counted=counted) if rows else None
    of_columns = linear_kernel.linear_importance_triton(x, dy, w, columns=True, counted=counted) if columns else None
    return vectors(of_rows, of_columns)


def _refuse(x: Tensor, dy: Tensor, w: Tensor) -> None:
    """Raise for the argument of `linear_importance_triton` that has the wrong dimensions or type."""
    for name, tensor, ndim in (("x", x, 3), ("dy", dy, 3), ("w", w, 2)):
        if tensor.ndim != ndim:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}; x is [N, T, I], dy [N, T, O] and w [O, I]")
        _check_dtype(name, tensor)


def grouped_linear_importance_triton(
    x: Tensor, dy: Tensor, w: Tensor, offsets: Tensor, side: Side = "both"
) -> GroupedVectors:
    """`linear_importance` of each expert's weight, on the tokens that it sees: a ragged batch of samples.

    Args:
        x: [R, I] fp32, bf16 or fp16, the inputs, expert by expert and sample by sample.
        dy: [R, O] any of these types, the gradient of each sample's loss with respect to the outputs; dtypes that
            differ are treated as in `linear_importance_triton`.
        w: [E, O, I] any of these types, the weights.
        offsets: [E * N + 1] int64 on their device, where each sample's rows of each expert begin, and the end; copied
            where its stride is not 1.
        side: which sums to compute; "both" computes the gradients twice.

    One launch for all experts and a side; a gradient is never written to memory. A tensor whose inner stride is not 1
    is copied. Accumulates in fp32 and in fixed order: the same bits every time.

    Raises:
        ValueError: shapes that do not fit, or an unsupported dtype; names the argument.
    """
    check_grouped(x, dy, w, offsets)
    for name, tensor in (("x", x), ("dy", dy), ("w", w)):
        _check_dtype(name, tensor)
    dtype = torch.promote_types(x.dtype, dy.dtype)
    x, dy, w, offsets = (_unit_inner_stride(tensor) for tensor in (x.to(dtype), dy.to(dtype), w, offsets))
    rows, columns = (
        grouped_kernel.grouped_linear_importance_triton(x, dy, w, offsets, columns=across) if asked else None
        for across, asked in zip((False, True), sides(side), strict=True)
    )
    return GroupedVectors(*_sides(rows, columns))


def mask_gradient_triton(x: Tensor, dx: Tensor) -> MaskGradient:
    """The gradient of a mask on each input column of a linear layer and the input's sum of squares, by sample.

    Args:
        x: [N, T, I] fp32, bf16 or fp16, the layer's input; copied where its inner stride is not 1.
        dx: [N, T, I] the same, the gradient of each sample's loss with respect to it.

    One kernel reads both once. Accumulates in fp32 and in fixed order: the same bits every time.

    Raises:
        ValueError: shapes that differ or are not [N, T, I], or an unsupported dtype; names the argument.
    """
    for name, tensor in (("x", x), ("dx", dx)):
        if tensor.ndim != 3 or tensor.shape != x.shape:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}; x and dx have one shape [N, T, I]")
        _check_dtype(name, tensor)
    return MaskGradient(*mask_kernel.mask_gradient_triton(_unit_inner_stride(x), _unit_inner_stride(dx)))


def cheapest_removals_triton(inverse: Tensor, gram: Tensor, columns: int, count: int) -> Removals:
    """The groups that go when the cheapest one is removed `count` times.

    Args:
        inverse: [k * c, k * c] fp64, A^-1, positive definite; copied where its inner stride is not 1, or where its rows
            lie further apart than 32 bits count.
        gram: [k * c, k * c] the same, M.
        columns: c, of each group. Groups of several columns are few and go by matrix products, as the reference; so do
            more than 1024 columns.
        count: 0 to k.

    One launch for all removals. In fixed order: the same bits every time; of equal costs the lower index goes first.

    Raises:
        ValueError: the arguments do not fit; names the argument.
    """
    check_removals(inverse, gram, columns, count)
    if columns > 1 or len(inverse) > removals_kernel.MOST_COLUMNS:
        return cheapest_removals_reference(inverse, gram, columns, count)
    # The kernel counts elements in 32 bits: in 64 it would spill registers.
    near = [matrix if matrix.stride(0) * len(matrix) < 2**31 else matrix.contiguous() for matrix in (inverse, gram)]
    return Removals(*removals_kernel.cheapest_removals_triton(*map(_unit_inner_stride, near), count))


def vectors(rows: tuple[Tensor, Tensor] | None, columns: tuple[Tensor, Tensor] | None) -> ImportanceVectors:
    """From a kernel's results for each side: sums [2, O] or [2, I], of |w g| and w^2 g^2, and statistics [5]."""
    return ImportanceVectors(*_sides(rows, columns))


def _sides(
    rows: tuple[Tensor, Tensor] | None, columns: tuple[Tensor, Tensor] | None
) -> tuple[Tensor | None, Tensor | None, GradientStatistics[Tensor]]:
    """Both sides' sums, and the statistics, which either side's results end with."""
    either = rows or columns
    assert either is not None
    return rows and rows[0], columns and columns[0], GradientStatistics.unpack(either[1])


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name}: dtype {tensor.dtype} is not one of float32, bfloat16, float16")


def _unit_inner_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
