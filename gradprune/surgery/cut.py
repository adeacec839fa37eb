"""Surgery: cut the pruned groups out of the weights, and write the new widths into the configuration."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models import Block, PrunableModel, describe
from gradprune.models.masks import GroupMasks
from gradprune.models.modeling_gradprune import PRUNED_CLASSES, drop_block, stock_class
from gradprune.models.widths import state_widths


def cut(model: PreTrainedModel, masks: GroupMasks, *, inplace: bool = False) -> PreTrainedModel:
    """Remove the groups that `masks` does not keep.

    The result computes what `model` would if those groups' columns of the output projections were zero. A block that
    keeps nothing is removed together with its norm, which leaves the residual stream unchanged.

    Args:
        model: a supported causal LM, pruned before or not.
        masks: what each block keeps.
        inplace: cut `model` itself, layer by layer. Otherwise `model` is unchanged, and the result is a new model
            that shares memory with it for every tensor that was not cut.

    Returns:
        The cut model: of its original class where all layers have the same widths, else of the class in
        `modeling_gradprune`, with `per_layer_config` in its configuration.

    Raises:
        ValueError: a mask's length is not its block's number of groups, or a block has no mask.
        UnsupportedArchitectureError: not the architecture's own causal LM class, or one that gradprune made of it.
    """
    view = describe(model)
    check_class(model)
    _check_masks(view, masks)
    if not inplace:
        model = _sharing_copy(model)
        view = describe(model)
    with torch.no_grad():
        for block in view.blocks:
            kept = masks[block]
            if kept.any():
                _shrink(block, kept)
            else:
                drop_block(view.layers[block.layer], block.kind.name)
    state_widths(describe(model), before=view)
    return model


def check_class(model: PreTrainedModel) -> None:
    """Refuse a class that cutting would replace by another, losing what it adds: a classifier's head, say.

    Raises:
        UnsupportedArchitectureError: naming the class, and the one to load it as.
    """
    pruned = PRUNED_CLASSES[model.config.model_type]
    # A model loaded with trust_remote_code has a class of the same name, defined by the file beside its weights.
    if type(model) is not stock_class(pruned) and type(model).__name__ != pruned.__name__:
        raise UnsupportedArchitectureError(
            f"model: a {type(model).__name__} cannot be cut; load it as {stock_class(pruned).__name__}"
        )


def _sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """New modules and parameters on the same memory, so that the two models' dtypes and gradients are independent."""
    # deepcopy reuses the objects in its memo instead of copying them.
    memo: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    memo |= {id(old): _parameter(old, old.detach()) for old in model.parameters()}
    return copy.deepcopy(model, memo)


def _check_masks(view: PrunableModel, masks: GroupMasks) -> None:
    expected = {block.key: block.groups for block in view.blocks}
    given = {key: len(masks[key]) for key in masks}
    for key in sorted(expected.keys() | given.keys()):
        if expected.get(key, 0) != given.get(key, 0):
            raise ValueError(
                f"masks: layer {key.layer} {key.kind} has {given.get(key, 0)} entries, "
                f"but the model's block has {expected.get(key, 0)} groups"
            )


def _shrink(block: Block, kept: Tensor) -> None:
    """Keep only the rows and columns of the kept groups ([groups] bool, at least one True)."""
    if kept.all():
        return
    groups = kept.nonzero().flatten()
    for entry in block.inputs:
        rows = entry.rows_of(groups).to(entry.linear.weight.device)
        entry.linear.weight = _parameter(entry.linear.weight, entry.linear.weight.index_select(0, rows))
        entry.linear.out_features = len(rows)
        if entry.linear.bias is not None:
            entry.linear.bias = _parameter(entry.linear.bias, entry.linear.bias.index_select(0, rows))
    output = block.output.linear
    columns = block.output.columns_of(groups).to(output.weight.device)
    output.weight = _parameter(output.weight, output.weight.index_select(1, columns))
    output.in_features = len(columns)


def _parameter(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new, requires_grad=old.requires_grad)
