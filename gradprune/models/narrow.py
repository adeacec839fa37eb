"""Cut groups out of a model in place, and make its class, configuration and attributes agree with the result."""

import torch
from torch import Tensor, nn

from gradprune.models.blocks import Block, Cut, LinearBlock, PrunableModel
from gradprune.models.masks import GroupMasks
from gradprune.models.modeling_gradprune import drop_block, is_linear, state_features
from gradprune.models.residency import selected
from gradprune.models.view import view_of
from gradprune.models.widths import state_widths


@torch.no_grad()
def narrow(view: PrunableModel, masks: GroupMasks) -> None:
    """Remove the groups that `masks` does not keep, layer by layer; drop a block that keeps none, with its norms.

    Blocks without a mask stay as they are. The view is stale afterwards.

    Raises:
        ValueError: a mask cannot be cut: no shared expert's channel stays, or experts would differ in width, or too few
            stay.
    """
    kinds = {key.kind for key in (*(block.key for block in view.blocks), *view.dropped)}
    # All cuts are determined before the first change, because masks of experts can be refused.
    cuts = [(block, _cuts(block, masks[block])) for block in view.blocks if block in masks]
    for block, of_block in cuts:
        if of_block is None:
            drop_block(view.layers[block.layer], block.kind.name)
            continue
        for each in of_block:
            _select(view, block, each)
    state_widths(view_of(view.model, kinds), before=view)


def _cuts(block: Block, kept: Tensor) -> list[Cut] | None:
    """Return what remains of the block's parameters; None if the block is removed. kept: [groups] bool.

    Raises:
        ValueError: the block would be removed, but is part of a module that stays.
    """
    if isinstance(block, LinearBlock) and not kept.any():
        if block.kind.optional:
            raise ValueError(f"masks: layer {block.layer} keeps no {block.kind.groups}; at least one has to stay")
        return None
    return [] if kept.all() else list(block.cuts(kept.nonzero().flatten()))


def _select(view: PrunableModel, block: Block, cut: Cut) -> None:
    """Replace a parameter or buffer of the block by the part of it that `cut` keeps."""
    owner, _, name = cut.path.rpartition(".")
    module = view.layers[block.layer].get_submodule(f"{block.path}.{owner}".removesuffix("."))
    old: Tensor = getattr(module, name)
    new = selected(old, cut.dim, cut.index)
    setattr(module, name, parameter_like(old, new) if isinstance(old, nn.Parameter) else new)
    if is_linear(module):
        state_features(module)
    if view.residency is not None and isinstance(old, nn.Parameter):
        view.residency.cut(block.layer, f"{block.path}.{cut.path}", cut.dim, cut.index)


def parameter_like(old: Tensor, new: Tensor) -> nn.Parameter:
    """Return `new` as a parameter that requires a gradient if `old` does."""
    return nn.Parameter(new, requires_grad=old.requires_grad)
