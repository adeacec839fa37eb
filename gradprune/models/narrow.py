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
            _shrink(view, block, kept)
        else:
            drop_block(view.layers[block.layer], block.kind.name)
    state_widths(view_of(view.model, kinds), before=view)


def _shrink(view: PrunableModel, block: Block, kept: Tensor) -> None:
    """Keep only the rows and columns of the kept groups ([groups] bool, at least one True)."""
    if kept.all():
        return
    groups = kept.nonzero().flatten()
    for entry in block.inputs:
        rows = entry.rows_of(groups)
        entry.linear.out_features = len(rows)
        for name, _ in list(entry.linear.named_parameters()):
            _select(view, block, f"{entry.path}.{name}", 0, rows)
    for rider in block.riders:
        _select(view, block, rider.path, 0, rider.rows_of(groups))
    columns = block.output.columns_of(groups)
    block.output.linear.in_features = len(columns)
    _select(view, block, f"{block.output.path}.weight", 1, columns)


def _select(view: PrunableModel, block: Block, path: str, dim: int, index: Tensor) -> None:
    """Keep only the `index` ([k] int64) rows (dim 0) or columns (dim 1) of the parameter at `path` in the block."""
    owner, _, name = path.rpartition(".")
    module = block.module.get_submodule(owner)
    old = module.get_parameter(name)
    setattr(module, name, parameter_like(old, old.index_select(dim, index.to(old.device))))
    if view.residency is not None:
        view.residency.cut(block.layer, f"{block.path}.{path}", dim, index)


def parameter_like(old: Tensor, new: Tensor) -> nn.Parameter:
    """`new` as a parameter that requires a gradient where `old` does."""
    return nn.Parameter(new, requires_grad=old.requires_grad)
