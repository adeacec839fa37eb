"""The importance ops as Triton kernels, for CUDA tensors (or for CPU tensors under Triton's interpreter)."""

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
    """Compute row and column sums of |w g| and w^2 g^2, and the statistics of g, reading each matrix once.

    Args:
        w: [O, I] fp32, bf16 or fp16, the weight; copied if its inner stride is not 1.
        g: [O, I] of the same types, the gradient of w; copied if its inner stride is not 1.
        side: which sums to compute.

    Deterministic: accumulates in fp32, in a fixed order.

    Raises:
        ValueError: an argument is not a matrix, the shapes differ, or a dtype is unsupported; the message names the
            argument.
    """
    for name, tensor in (("w", w), ("g", g)):
        if tensor.ndim != 2 or tensor.shape != w.shape:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}; w and g must be matrices of one shape [O, I]")
        _check_dtype(name, tensor)
    return vectors(*taylor_kernel.taylor_score_triton(_unit_inner_stride(w), _unit_inner_stride(g), *sides(side)))


def linear_importance_triton(
    x: Tensor, dy: Tensor, w: Tensor, side: Side = "both", counted: bool = True
) -> ImportanceVectors:
    """Compute `taylor_score` of each sample's weight gradient g_n = dy_n^T x_n, and sum the results over samples.

    Args:
        x: [N, T, I] fp32, bf16 or fp16, the layer's input.
        dy: [N, T, O] of any of these types, the gradient of each sample's loss with respect to the layer's output. If
            its dtype differs from that of x, both are converted to the wider one (bf16 and fp16: to fp32).
        w: [O, I] of any of these types, the weight.
        side: which sums to compute; "both" computes the gradient twice.
        counted: whether to count the non-finite elements of gradients and leave them out of the other statistics; if
            False, their number is given as 0, and they make the sums among the statistics non-finite.

    One kernel multiplies and scores; a gradient is never written to memory. A tensor whose inner stride is not 1 is
    copied. Deterministic: accumulates in fp32, in a fixed order.

    Raises:
        ValueError: the shapes do not fit, or a dtype is unsupported; the message names the argument.
    """
    if (x.ndim, dy.ndim, w.ndim) != (3, 3, 2) or not {x.dtype, dy.dtype, w.dtype} <= _DTYPES:
        _refuse(x, dy, w)
    if dy.shape[:2] != x.shape[:2]:
        raise ValueError(f"dy: has shape {tuple(dy.shape)}; samples and tokens must be {tuple(x.shape[:2])}, as in x")
    if w.shape != (dy.shape[2], x.shape[2]):
        raise ValueError(f"w: has shape {tuple(w.shape)}; dy and x require {(dy.shape[2], x.shape[2])}")
    if x.dtype != dy.dtype:
        dtype = torch.promote_types(x.dtype, dy.dtype)
        x, dy = x.to(dtype), dy.to(dtype)
    x, dy, w = _unit_inner_stride(x), _unit_inner_stride(dy), _unit_inner_stride(w)
    rows, columns = sides(side)
    of_rows = linear_kernel.linear_importance_triton(x, dy, w, columns=False, counted=counted) if rows else None
    of_columns = linear_kernel.linear_importance_triton(x, dy, w, columns=True, counted=counted) if columns else None
    return vectors(of_rows, of_columns)


def _refuse(x: Tensor, dy: Tensor, w: Tensor) -> None:
    """Raise an error that names the argument of `linear_importance_triton` with the wrong dimensions or dtype."""
    for name, tensor, ndim in (("x", x, 3), ("dy", dy, 3), ("w", w, 2)):
        if tensor.ndim != ndim:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}; x must be [N, T, I], dy [N, T, O] and w [O, I]")
        _check_dtype(name, tensor)


def grouped_linear_importance_triton(
    x: Tensor, dy: Tensor, w: Tensor, offsets: Tensor, side: Side = "both"
) -> GroupedVectors:
    """Compute `linear_importance` of each expert's weight on the tokens that the expert sees, a ragged batch.

    Args:
        x: [R, I] fp32, bf16 or fp16, the inputs, ordered by expert and then by sample.
        dy: [R, O] of any of these types, the gradient of each sample's loss with respect to the outputs; if its dtype
            differs from that of x, both are converted as by `linear_importance_triton`.
        w: [E, O, I] of any of these types, the weights.
        offsets: [E * N + 1] int64 on the same device, the row at which each sample's rows of each expert begin, and the
            end of the last; copied if its stride is not 1.
        side: which sums to compute; "both" computes the gradients twice.

    One launch per side serves all experts; a gradient is never written to memory. A tensor whose inner stride is not 1
    is copied. Deterministic: accumulates in fp32, in a fixed order.

    Raises:
        ValueError: the shapes do not fit, or a dtype is unsupported; the message names the argument.
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
    """Compute each sample's gradient of a mask on a linear layer's input columns, and the input's sums of squares.

    Args:
        x: [N, T, I] fp32, bf16 or fp16, the layer's input; copied if its inner stride is not 1.
        dx: [N, T, I] of the same types, the gradient of each sample's loss with respect to x; copied likewise.

    One kernel reads both tensors once. Deterministic: accumulates in fp32, in a fixed order.

    Raises:
        ValueError: the shapes differ or are not [N, T, I], or a dtype is unsupported; the message names the argument.
    """
    for name, tensor in (("x", x), ("dx", dx)):
        if tensor.ndim != 3 or tensor.shape != x.shape:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}; x and dx must have one shape [N, T, I]")
        _check_dtype(name, tensor)
    return MaskGradient(*mask_kernel.mask_gradient_triton(_unit_inner_stride(x), _unit_inner_stride(dx)))


def cheapest_removals_triton(inverse: Tensor, gram: Tensor, columns: int, count: int) -> Removals:
    """Remove the cheapest group of columns `count` times, see `gradprune.ops.removals`.

    Args:
        inverse: [k * c, k * c] fp64, A^-1, positive definite; copied if its inner stride is not 1, or if its rows are
            so far apart that element offsets exceed 32 bits.
        gram: [k * c, k * c] fp64, M; copied likewise.
        columns: c, the number of columns of each group. If it is above 1, the reference runs instead: such groups are
            few, and it removes them by matrix products. The reference also runs for more than 1024 columns in all.
        count: number of groups to remove, 0 to k.

    One launch makes all removals. Deterministic; ties are broken by the lower index.

    Raises:
        ValueError: the arguments do not fit; the message names the argument.
    """
    check_removals(inverse, gram, columns, count)
    if columns > 1 or len(inverse) > removals_kernel.MOST_COLUMNS:
        return cheapest_removals_reference(inverse, gram, columns, count)
    # The kernel computes element offsets in 32 bits, because with 64 bits it would spill registers.
    near = [matrix if matrix.stride(0) * len(matrix) < 2**31 else matrix.contiguous() for matrix in (inverse, gram)]
    return Removals(*removals_kernel.cheapest_removals_triton(*map(_unit_inner_stride, near), count))


def vectors(rows: tuple[Tensor, Tensor] | None, columns: tuple[Tensor, Tensor] | None) -> ImportanceVectors:
    """Assemble a kernel's results per side: sums [2, O] or [2, I] of |w g| and w^2 g^2, and statistics [5]."""
    return ImportanceVectors(*_sides(rows, columns))


def _sides(
    rows: tuple[Tensor, Tensor] | None, columns: tuple[Tensor, Tensor] | None
) -> tuple[Tensor | None, Tensor | None, GradientStatistics[Tensor]]:
    """Return both sides' sums, and the statistics, which each side's results contain."""
    either = rows or columns
    assert either is not None
    return rows and rows[0], columns and columns[0], GradientStatistics.unpack(either[1])


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name}: dtype {tensor.dtype} is not one of float32, bfloat16, float16")


def _unit_inner_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
