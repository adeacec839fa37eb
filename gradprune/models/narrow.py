"""Cut groups out of a model in place, and make its class, configuration and attributes agree with what is left."""

import torch
from torch import Tensor, nn

from gradprune.models.blocks import Block, PrunableModel
from gradprune.models.masks import GroupMasks
from gradprune.models.modeling_gradprune import drop_block
from gradprune.models.view import view_of
from gradprune.models.widths import state_widths


@torch.no_grad()
def narrow(view: PrunableModel, masks: GroupMasks) -> None:
    """Remove the groups that `masks` does not keep, layer by layer; a block that keeps none is dropped with its norms.

    The view is stale afterwards.
    """
    kinds = {key.kind for key in (*(block.key for block in view.blocks), *view.dropped)}
    for block in view.blocks:
        kept = masks[block]
        if kept.any():
            _shrink(block, kept)
        else:
            drop_block(view.layers[block.layer], block.kind.name)
    state_widths(view_of(view.model, kinds), before=view)


def _shrink(block: Block, kept: Tensor) -> None:
    """Keep only the rows and columns of the kept groups ([groups] bool, at least one True)."""
    if kept.all():
        return
    groups = kept.nonzero().flatten()
    for entry in block.inputs:
        rows = entry.rows_of(groups).to(entry.linear.weight.device)
        entry.linear.weight = parameter_like(entry.linear.weight, entry.linear.weight.index_select(0, rows))
        entry.linear.out_features = len(rows)
        if entry.linear.bias is not None:
            entry.linear.bias = parameter_like(entry.linear.bias, entry.linear.bias.index_select(0, rows))
    for rider in block.riders:
        owner, _, name = rider.path.rpartition(".")
        rows = rider.rows_of(groups).to(rider.parameter.device)
        setattr(
            block.module.get_submodule(owner),
            name,
            parameter_like(rider.parameter, rider.parameter.index_select(0, rows)),
        )
    output = block.output.linear
    columns = block.output.columns_of(groups).to(output.weight.device)
    output.weight = parameter_like(output.weight, output.weight.index_select(1, columns))
    output.in_features = len(columns)


def parameter_like(old: Tensor, new: Tensor) -> nn.Parameter:
    """`new` as a parameter that requires a gradient where `old` does."""
    return nn.Parameter(new, requires_grad=old.requires_grad)
