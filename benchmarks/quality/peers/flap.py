"""FLAP: fluctuation-based pruning with bias compensation (An et al. 2023, arXiv:2312.11983).

Column j of an output projection W scores Var_j * ||W_:j||^2, with Var_j the variance over calibration tokens of its
input (the paper's WIFV). Within each block the columns' scores are standardised (mean 0, deviation 1), a head's are
averaged over its columns, here over those of a KV head's query heads; then the groups of all blocks are sorted
together. What the removed columns wrote on average is added as a bias: W_:Q mean(x_Q).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.quality.peers.choice import PeerChoice, global_masks, in_order
from gradprune.models import Block, BlockKey, PrunableModel


def flap(view: PrunableModel, batches: Sequence[Tensor], budget: int) -> PeerChoice:
    """Choose globally over the model, by scores on the inputs of the dense model, and compensate by biases."""
    scores: dict[BlockKey, Tensor] = {}
    means: dict[BlockKey, Tensor] = {}

    def measure(block: Block, x: Tensor) -> Tensor:
        means[block.key] = x.double().mean(0)
        columns = standardised(fluctuation(block.output.weight, x))
        scores[block.key] = (block.output.fold_columns(columns) / block.output.columns).cpu()
        return torch.ones(block.groups, dtype=torch.bool)

    in_order(view, batches, measure)
    masks = global_masks(view, scores, budget)
    biases = {
        block.key: removed_mean(block, means[block.key], masks[block])
        for block in view.blocks
        if not masks[block].all()
    }
    return PeerChoice(masks, biases=biases)


def fluctuation(weight: Tensor, x: Tensor) -> Tensor:
    """[I] fp64: variance over tokens of x [tokens, I] times the squared norm of each column of weight [O, I]."""
    return x.double().var(0) * weight.double().square().sum(0)


def standardised(scores: Tensor) -> Tensor:
    """[I]: scores [I] shifted and scaled to mean 0 and standard deviation 1."""
    return (scores - scores.mean()) / scores.std()


def removed_mean(block: Block, mean: Tensor, kept: Tensor) -> Tensor:
    """[O] fp64: the output of the removed groups' columns for the mean input [I]; kept: [groups] bool."""
    removed = block.output.columns_of((~kept).nonzero().flatten()).to(mean.device)
    return block.output.weight.detach().double()[:, removed] @ mean[removed]
