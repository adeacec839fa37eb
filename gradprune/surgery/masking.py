"""Masking: make a model compute what it would without some groups, without cutting it; exactly reversible.

Zeroing a group's columns of the output projection has the same effect as cutting the group.
"""

from collections.abc import Iterator
from contextlib import contextmanager

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
    saved: list[tuple[Tensor, Tensor]] = []
    for block, kept in masks_by_block(view, masks):
        if not kept.all():
            saved += [(parameter, parameter.detach().clone()) for parameter in block.output.linear.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in saved:
                parameter.copy_(before)


@contextmanager
def masked(view: PrunableModel, masks: GroupMasks) -> Iterator[None]:
    """Inside the context the model computes what the cut one would."""
    with output_weights_restored(view, masks):
        for block, kept in masks_by_block(view, masks):
            mask_output(block, kept)
        yield


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
