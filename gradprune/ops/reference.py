"""The oracle: each engine op in plain PyTorch, as its formula reads. Runs anywhere, in fp64 too.

Sources: the first-order Taylor score |w g| is Molchanov et al. 2019 (arXiv:1906.10771); the diagonal
empirical Fisher in place of the Hessian is Theis et al. 2018 (arXiv:1801.05787).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradprune.ops.vectors import ImportanceVectors


def taylor_score_reference(w: Tensor, g: Tensor) -> ImportanceVectors:
    """Row and column sums of |w g|, w g and w^2 g^2, and the statistics of g.

    Args:
        w: [O, I] floating point, the weight.
        g: [O, I] floating point, the gradient of one sample's (or batch's) loss.

    Accumulates in fp32, in fp64 where both are fp64. Deterministic.
    """
    dtype = torch.float64 if w.dtype == g.dtype == torch.float64 else torch.float32
    w, g = w.to(dtype), g.to(dtype)
    product = w * g
    absolute, square = product.abs(), product * product
    return ImportanceVectors(
        absolute.sum(1), product.sum(1), square.sum(1),
        absolute.sum(0), product.sum(0), square.sum(0),
        gradient_statistics(g),
    )  # fmt: skip


def linear_importance_reference(x: Tensor, dy: Tensor, w: Tensor) -> ImportanceVectors:
    """`taylor_score` of each sample's weight gradient g_n = dy_n^T x_n of a linear layer, summed over samples.

    Args:
        x: [N, T, I] floating point, the layer's input.
        dy: [N, T, O] floating point, the gradient of each sample's loss at the layer's output.
        w: [O, I] floating point, the weight.

    The gradient is formed in fp32 (fp64 where all are fp64), one sample at a time. Deterministic.
    """
    dtype = torch.float64 if x.dtype == dy.dtype == w.dtype == torch.float64 else torch.float32
    w = w.to(dtype)
    scores = [taylor_score_reference(w, dy[n].to(dtype).T @ x[n].to(dtype)) for n in range(x.shape[0])]
    return sum_vectors(scores)


def sum_vectors(scores: Sequence[ImportanceVectors]) -> ImportanceVectors:
    """The vectors of several gradients of one weight (at least one), summed; their statistics merged."""
    return ImportanceVectors(
        row_abs=torch.stack([score.row_abs for score in scores]).sum(0),
        row_signed=torch.stack([score.row_signed for score in scores]).sum(0),
        row_square=torch.stack([score.row_square for score in scores]).sum(0),
        column_abs=torch.stack([score.column_abs for score in scores]).sum(0),
        column_signed=torch.stack([score.column_signed for score in scores]).sum(0),
        column_square=torch.stack([score.column_square for score in scores]).sum(0),
        statistics=merge_statistics(torch.stack([score.statistics for score in scores])),
    )


def gradient_statistics(g: Tensor) -> Tensor:
    """[5] statistics of a gradient of any shape: sum|g|, sum g^2, max|g|, min|g|, number of non-finite elements.

    Non-finite elements enter none of the first four. fp32, fp64 where g is fp64. Deterministic.
    """
    g = g.to(torch.float64 if g.dtype == torch.float64 else torch.float32).reshape(-1)
    finite = g.isfinite()
    absolute = torch.where(finite, g.abs(), 0.0)
    largest = absolute.max() if g.numel() else g.new_zeros(())
    smallest = torch.where(finite, g.abs(), torch.inf).min() if g.numel() else g.new_full((), torch.inf)
    return torch.stack([absolute.sum(), absolute.square().sum(), largest, smallest, (~finite).sum().to(g.dtype)])


def merge_statistics(statistics: Tensor) -> Tensor:
    """Merge [K, 5] statistics of K gradients into the [5] of all their elements together."""
    return torch.stack(
        [
            statistics[:, 0].sum(),
            statistics[:, 1].sum(),
            statistics[:, 2].max(),
            statistics[:, 3].min(),
            statistics[:, 4].sum(),
        ]
    )


def scale_statistics(statistics: Tensor, scales: Sequence[float]) -> Tensor:
    """[K, 5] statistics of K gradients, each then multiplied by its scale > 0."""
    s = torch.tensor(scales, dtype=statistics.dtype, device=statistics.device)
    factors = torch.stack([s, s * s, s, s, torch.ones_like(s)], dim=1)
    return statistics * factors


def grad_stats_reference(grads: Sequence[Tensor]) -> Tensor:
    """[K, 5] fp64 statistics of K gradients: sum|g|, sum g^2, max|g|, min|g|, number of non-finite elements.

    Non-finite elements enter none of the first four. Accumulates in fp32, in fp64 where g is fp64. Deterministic.
    """
    if not grads:
        return torch.empty(0, 5, dtype=torch.float64)
    return torch.stack([gradient_statistics(grad.detach()).double() for grad in grads])


def scale_gradients_reference(grads: Sequence[Tensor], scales: Sequence[float]) -> None:
    """grads[k] <- grads[k] * scales[k], in place; a gradient whose scale is 1 is not touched.

    The product in fp32 (fp64 for fp64), rounded to nearest even.

    Raises:
        ValueError: the lengths differ.
    """
    if len(grads) != len(scales):
        raise ValueError(f"scales: has {len(scales)} entries for {len(grads)} gradients; one for each is needed")
    for grad, scale in zip(grads, scales, strict=True):
        if scale != 1.0:
            grad.detach().mul_(scale)
