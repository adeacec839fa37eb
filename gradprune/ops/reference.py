"""The oracle: each op in plain PyTorch, written as its formula. Runs on any device, also in fp64.

Sources: the first-order Taylor score |w g| is Molchanov et al. 2019 (arXiv:1906.10771); the diagonal
empirical Fisher in place of the Hessian is Theis et al. 2018 (arXiv:1801.05787).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gradprune.accumulation import accumulation_dtype
from gradprune.ops.vectors import (
    GradientStatistics,
    GroupedVectors,
    ImportanceVectors,
    MaskGradient,
    Side,
    check_grouped,
    sides,
)

_SIDES: tuple[Literal["rows", "columns"], ...] = ("rows", "columns")


def taylor_score_reference(w: Tensor, g: Tensor, side: Side = "both") -> ImportanceVectors:
    """Compute row and column sums of |w g| and w^2 g^2, and the statistics of g.

    Args:
        w: [O, I] floating point, the weight.
        g: [O, I] floating point, the gradient of one sample's (or batch's) loss.
        side: which sums to compute.

    Accumulates in fp32 (fp64 if both are fp64). Deterministic.
    """
    rows, columns = sides(side)
    dtype = accumulation_dtype(w, g)
    w, g = w.to(dtype), g.to(dtype)
    product = w * g
    absolute, square = product.abs(), product * product
    return ImportanceVectors(
        rows=torch.stack([absolute.sum(1), square.sum(1)]) if rows else None,
        columns=torch.stack([absolute.sum(0), square.sum(0)]) if columns else None,
        statistics=gradient_statistics(g),
    )


def linear_importance_reference(x: Tensor, dy: Tensor, w: Tensor, side: Side = "both") -> ImportanceVectors:
    """Compute `taylor_score` of each sample's weight gradient g_n = dy_n^T x_n, and sum the results over samples.

    Args:
        x: [N, T, I] floating point, the layer's input; N is at least 1.
        dy: [N, T, O] floating point, the gradient of each sample's loss with respect to the layer's output.
        w: [O, I] floating point, the weight.
        side: which sums to compute.

    The gradient is computed in fp32 (fp64 if all are fp64), one sample at a time. Deterministic.
    """
    dtype = accumulation_dtype(x, dy, w)
    w = w.to(dtype)
    return sum_vectors([taylor_score_reference(w, dy[n].to(dtype).T @ x[n].to(dtype), side) for n in range(x.shape[0])])


def grouped_linear_importance_reference(
    x: Tensor, dy: Tensor, w: Tensor, offsets: Tensor, side: Side = "both"
) -> GroupedVectors:
    """Compute `linear_importance` of each expert's weight on the tokens that the expert sees, a ragged batch.

    The gradient of expert e and sample n is g_en = sum over their rows r of dy_r x_r^T, and the result for expert e is
    the sum over n of `taylor_score(w_e, g_en)`.

    Args:
        x: [R, I] floating point, the inputs, one row for each pair of a token and an expert that sees it, ordered by
            expert and then by sample.
        dy: [R, O] floating point, the gradient of each sample's loss with respect to the outputs.
        w: [E, O, I] floating point, the weights.
        offsets: [E * N + 1] int64, ascending: the rows of expert e and sample n begin at offsets[e * N + n] and end
            before the next offset. The gradient of a sample without rows is zero, and counts in the statistics.
        side: which sums to compute.

    The gradient is computed in fp32 (fp64 if all are fp64), one sample at a time. Deterministic.
    """
    samples = check_grouped(x, dy, w, offsets)
    ends = offsets.tolist()
    found = []
    for expert, own in enumerate(w):
        spans = [slice(*ends[k : k + 2]) for k in range(expert * samples, (expert + 1) * samples)]
        of_samples = [linear_importance_reference(x[None, span], dy[None, span], own, side) for span in spans]
        found.append(sum_vectors(of_samples))
    rows, columns = (
        torch.stack([each.sums(name) for each in found]) if asked else None
        for name, asked in zip(_SIDES, sides(side), strict=True)
    )
    return GroupedVectors(rows, columns, GradientStatistics.unpack(torch.stack([s.statistics.pack() for s in found])))


def mask_gradient_reference(x: Tensor, dx: Tensor) -> MaskGradient:
    """Compute each sample's gradient of a mask on a linear layer's input columns, and the input's sums of squares.

    Args:
        x: [N, T, I] floating point, the layer's input.
        dx: [N, T, I] floating point, the gradient of each sample's loss with respect to x.

    Liu et al. 2021 (arXiv:2108.00708) use the mask's squared gradient as a group's importance; Wanda, Sun et al. 2023
    (arXiv:2306.11695), uses the input's second moment. Accumulates in fp32 (fp64 if both are fp64). Deterministic.
    """
    dtype = accumulation_dtype(x, dx)
    x, dx = x.to(dtype), dx.to(dtype)
    return MaskGradient((x * dx).sum(1), x.square().sum(1))


def sum_vectors(scores: Sequence[ImportanceVectors]) -> ImportanceVectors:
    """Sum the vectors of one or more gradients of one weight, all with the same sides, and merge their statistics."""

    def total(found: list[Tensor | None]) -> Tensor | None:
        asked = [sums for sums in found if sums is not None]
        return torch.stack(asked).sum(0) if asked else None

    packed = torch.stack([score.statistics.pack() for score in scores])
    return ImportanceVectors(
        total([score.rows for score in scores]),
        total([score.columns for score in scores]),
        GradientStatistics.unpack(packed).merge(),
    )


def gradient_statistics(g: Tensor) -> GradientStatistics[Tensor]:
    """Compute the statistics of a gradient of any shape, in fp32 (fp64 if g is fp64). Deterministic."""
    g = g.to(accumulation_dtype(g)).reshape(-1)
    finite = g.isfinite()
    absolute = torch.where(finite, g.abs(), 0.0)
    largest = absolute.max() if g.numel() else g.new_zeros(())
    smallest = torch.where(finite, g.abs(), torch.inf).min() if g.numel() else g.new_full((), torch.inf)
    return GradientStatistics(absolute.sum(), absolute.square().sum(), largest, smallest, (~finite).sum().to(g.dtype))


def grad_stats_reference(grads: Sequence[Tensor]) -> GradientStatistics[Tensor]:
    """Compute the statistics of K gradients of any shapes, each field [K] fp64.

    Accumulates in fp32 (fp64 for fp64 gradients). Deterministic.
    """
    if not grads:
        return GradientStatistics.unpack(torch.empty(0, 5, dtype=torch.float64))
    return GradientStatistics.stack([gradient_statistics(grad.detach()) for grad in grads])


def scale_gradients_reference(grads: Sequence[Tensor], scales: Sequence[float]) -> None:
    """Multiply grads[k] by scales[k] in place; a gradient whose scale is 1 is not touched.

    The product is computed in fp32 (fp64 for fp64 gradients) and rounded to nearest even.

    Raises:
        ValueError: the lengths differ.
    """
    if len(grads) != len(scales):
        raise ValueError(f"scales: has {len(scales)} entries for {len(grads)} gradients; one for each is needed")
    for grad, scale in zip(grads, scales, strict=True):
        if scale != 1.0:
            grad.detach().mul_(scale)
