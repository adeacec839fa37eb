"""LLM-Pruner: first-order Taylor importance of dependent structures (Ma et al. 2023, arXiv:2305.11627).

The element-wise first-order score |w dL/dw|, with L the mean loss of the whole calibration batch, is summed over all
the weights that are removed with a group: its rows of the input projections and its columns of the output projection.
The lowest-scoring groups of each block are removed, the same number in every layer except the first 4 and the last 2 of
LLaMA-7B's 32, which stay as they are. In a model of n layers, the first ceil(n * 4/32) and the last ceil(n * 2/32)
stay, or none if that would leave no layer to prune.
"""

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from benchmarks.quality.peers.choice import PeerChoice, take_gradients, uniform_masks
from gradprune.models import Block, PrunableModel
from gradprune.models.blocks import Projection
from gradprune.models.modes import evaluation_mode


def llm_pruner(view: PrunableModel, batches: Sequence[Tensor], budget: int) -> PeerChoice:
    """Choose within each block, the same number of groups in every middle layer, without compensation.

    A block keeps at least one group, so less than the budget is removed if the middle layers hold too little.
    """
    model = view.model
    try:
        with evaluation_mode(model), torch.enable_grad():
            take_gradients(model, batches)
        scores = {block.key: group_scores(block).cpu() for block in view.blocks}
    finally:
        model.zero_grad(set_to_none=True)
    return PeerChoice(uniform_masks(view, scores, budget, middle_layers(len(view.layers))))


@torch.no_grad()
def group_scores(block: Block) -> Tensor:
    """[groups] fp64: sum of |w g| over each group's weights; the gradients must be in `.grad`."""
    total = block.output.fold_columns(_elements(block.output).sum(0))
    for projection in block.inputs:
        total = total + projection.fold_rows(_elements(projection).sum(1), block.groups)
    return total


def middle_layers(layers: int) -> range:
    """The indices of the layers that are pruned, in a model of the given number of layers."""
    first, last = ceil(layers * 4 / 32), ceil(layers * 2 / 32)
    return range(first, layers - last) if first + last < layers else range(layers)


def _elements(projection: Projection) -> Tensor:
    """[O, I] fp64: |w g| of a projection."""
    stored = projection.linear.weight
    assert stored.grad is not None
    elements = (stored.double() * stored.grad.double()).abs()
    return elements.T if projection.transposed else elements
