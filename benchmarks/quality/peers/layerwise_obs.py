"""Layerwise optimal brain surgeon at a uniform ratio, as ZipLM (arXiv:2302.04089) and SlimGPT (arXiv:2412.18110) do.

A block's output projection W reads x; H = mean over tokens of x x^T, with a hundredth of its mean diagonal added to its
diagonal, as SparseGPT and SlimGPT do. Greedily, the group Q is removed whose removal costs least once the remaining
columns are re-solved, tr( W_Q ((H^-1)_QQ)^-1 W_Q^T ), and then

    W <- W - W_Q ((H^-1)_QQ)^-1 (H^-1)_Q:        H^-1 <- H^-1 - (H^-1)_:Q ((H^-1)_QQ)^-1 (H^-1)_Q:

until the block has lost as many groups as every other block of its kind. Blocks are pruned in order, and each sees its
inputs in the model as pruned so far.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.quality.peers.choice import PeerChoice, in_order, outputs_restored, uniform_counts
from gradprune.models import Block, BlockKey, PrunableModel

_DAMPING = 0.01


def layerwise_obs(view: PrunableModel, batches: Sequence[Tensor], budget: int) -> PeerChoice:
    """Choose within each block, the same number of groups in every layer, and re-solve the remaining weights."""
    lost = uniform_counts(view, budget)
    weights: dict[BlockKey, Tensor] = {}

    def decide(block: Block, x: Tensor) -> Tensor:
        dense = block.output.weight
        weight, kept = surgeon(dense, damped(x), block.output.columns, lost[block.kind.name])
        weights[block.key] = weight.to(dense.dtype)
        dense.copy_(weight)
        return kept

    with outputs_restored(view):
        return PeerChoice(in_order(view, batches, decide), weights=weights)


def damped(x: Tensor) -> Tensor:
    """[I, I] fp64: H of the inputs x [tokens, I], damped."""
    hessian = x.double().T @ x.double() / len(x)
    hessian.diagonal().add_(_DAMPING * hessian.diagonal().mean())
    return hessian


def surgeon(weight: Tensor, hessian: Tensor, columns: int, count: int) -> tuple[Tensor, Tensor]:
    """Remove `count` groups of `columns` consecutive columns each.

    Args:
        weight: the output projection, [O, I] floating point.
        hessian: H of its inputs, [I, I] fp64, positive definite.
        columns: number of columns of each group.
        count: number of groups to remove.

    Returns:
        The weights with the removed columns zero, [O, I] fp64, and the groups that are kept, [groups] bool.
    """
    w, inverse = weight.detach().double().clone(), torch.linalg.inv(hessian)
    kept = torch.ones(w.shape[1] // columns, dtype=torch.bool)
    for _ in range(count):
        costs = _costs(w, inverse, columns)
        costs[~kept.to(costs.device)] = torch.inf
        group = int(costs.argmin())
        span = slice(group * columns, (group + 1) * columns)
        across = torch.linalg.solve(inverse[span, span], inverse[span])
        w.addmm_(w[:, span].clone(), across, alpha=-1.0)
        inverse.addmm_(inverse[:, span].clone(), across, alpha=-1.0)
        # Clear what rounding left: the removed columns are exactly zero, and their block of the inverse is invertible.
        w[:, span] = 0.0
        inverse[span] = 0.0
        inverse[:, span] = 0.0
        inverse.diagonal()[span] = 1.0
        kept[group] = False
    return w, kept


def _costs(weight: Tensor, inverse: Tensor, columns: int) -> Tensor:
    """[groups]: tr( W_Q ((H^-1)_QQ)^-1 W_Q^T ), the cost of removing each group Q by itself."""
    groups = weight.shape[1] // columns
    at = torch.arange(groups * columns, device=weight.device).view(groups, columns)
    blocks = inverse[at[:, :, None], at[:, None, :]]
    w = weight.T.reshape(groups, columns, -1)
    return (w * (torch.linalg.inv(blocks) @ w)).sum((1, 2))
