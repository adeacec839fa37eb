"""Masking: make a model compute what it would without some groups, without cutting it; exactly reversible.

Zeroing a group's columns of the output projection has the same effect as cutting the group.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gradprune.models import Block, PrunableModel
from gradprune.models.masks import GroupMasks


def masks_by_block(view: PrunableModel, masks: GroupMasks) -> Iterator[tuple[Block, Tensor]]:
    """Every existing block, in order, with the groups it keeps: [groups] bool."""
    for block in view.blocks:
        yield block, masks[block]


@contextmanager
def output_weights_restored(view: PrunableModel, masks: GroupMasks) -> Iterator[None]:
    """On exit, restore the output projections (weights and biases) of the blocks that `masks` prunes."""
    pruned = (block for block, kept in masks_by_block(view, masks) if not kept.all())
    # A streamed model's weights are not changed in memory: others take their place.
    with _restored(pruned) if view.residency is None else view.residency.restored():
        yield


@contextmanager
def masked(view: PrunableModel, masks: GroupMasks) -> Iterator[None]:
    """Inside the context the model, which is whole in memory, computes what the cut one would."""
    with ExitStack() as stack:
        for layer in range(len(view.layers)):
            stack.enter_context(masked_layer(view, masks, layer))
        yield


@contextmanager
def masked_layer(view: PrunableModel, masks: GroupMasks, layer: int) -> Iterator[None]:
    """Inside the context a decoder layer, whose weights are in memory, computes what the cut one would."""
    pruned = [block for block in view.of_layer(layer) if not masks[block].all()]
    with _restored(pruned):
        for block in pruned:
            mask_output(block, masks[block])
        yield


@contextmanager
def _restored(blocks: Iterable[Block]) -> Iterator[None]:
    """On exit, restore the output projections (weights and biases) of blocks in memory."""
    saved = [(own, own.detach().clone()) for block in blocks for own in block.output.linear.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in saved:
                parameter.copy_(before)


@torch.no_grad()
def mask_output(block: Block, kept: Tensor) -> None:
    """Zero the output columns of the pruned groups; also the bias if no group is kept, as cutting drops the block."""
    linear: nn.Linear = block.output.linear
    if kept.all():
        return
    gone = block.output.columns_of((~kept).nonzero().flatten()).to(linear.weight.device)
    linear.weight[:, gone] = 0.0
    if linear.bias is not None and not kept.any():
        linear.bias.zero_()
