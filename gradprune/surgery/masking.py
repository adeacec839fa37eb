"""Masking: make a model compute what it would without some groups, while nothing is cut; restored exactly.

Zero columns of an output projection are the same as a cut: a group's rows then write nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradprune.models import Block, PrunableModel
from gradprune.models.masks import GroupMasks


def masks_by_block(view: PrunableModel, masks: GroupMasks) -> Iterator[tuple[Block, Tensor]]:
    """Every existing block in the data's order, with what it keeps: [groups] bool."""
    for block in view.blocks:
        yield block, masks[block]


@contextmanager
def output_weights_restored(view: PrunableModel, masks: GroupMasks) -> Iterator[None]:
    """On exit the output projections of the blocks that `masks` prunes have the weights and biases they had."""
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
    """While open, the model computes what the cut one would."""
    with output_weights_restored(view, masks):
        for block, kept in masks_by_block(view, masks):
            mask_output(block, kept)
        yield


@torch.no_grad()
def mask_output(block: Block, kept: Tensor) -> None:
    """Zero the output columns of the groups that are not kept, and the bias where none is: the cut drops the block."""
    linear: nn.Linear = block.output.linear
    if kept.all():
        return
    gone = block.output.columns_of((~kept).nonzero().flatten()).to(linear.weight.device)
    linear.weight[:, gone] = 0.0
    if linear.bias is not None and not kept.any():
        linear.bias.zero_()
