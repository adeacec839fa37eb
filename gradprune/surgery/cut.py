"""Surgery: cut the groups that selection chose out of the weights, and state the new widths in the configuration."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models import Block, PrunableModel, describe
from gradprune.models.masks import GroupMasks
from gradprune.models.modeling_gradprune import (
    PRUNED_CLASSES,
    drop_attention,
    drop_mlp,
    homogeneous,
    per_layer_overrides,
    resolve_layer_config,
    stock_class,
)


def cut(model: PreTrainedModel, masks: GroupMasks, *, inplace: bool = False) -> PreTrainedModel:
    """Remove the groups that `masks` does not keep.

    The result computes what `model` would with those groups' columns of the output projections set to zero. A
    block that keeps nothing is removed with its norm and passes the residual stream through.

    Args:
        model: a supported causal LM, pruned before or not.
        masks: what each block keeps.
        inplace: cut `model` itself, layer by layer. Otherwise it stays as it is, and the result is a new model
            that shares the memory of every tensor that was not cut.

    Returns:
        The cut model: of its original class where all layers have the same widths, else of the class in
        `modeling_gradprune`, with `per_layer_config` in its configuration.

    Raises:
        ValueError: a mask's length is not the block's number of groups.
        UnsupportedArchitectureError: not the architecture's own causal LM class, or one that gradprune made of it.
    """
    view = describe(model)
    _check_class(model)
    _check_masks(view, masks)
    if not inplace:
        model = _sharing_copy(model)
        view = describe(model)
    heads = _head_shape(view)
    with torch.no_grad():
        for layer, attention, mlp, kept_heads, kept_channels in zip(
            view.layers, view.attention, view.mlp, masks.attention, masks.mlp, strict=True
        ):
            if attention is not None:
                _shrink(attention, kept_heads) if kept_heads.any() else drop_attention(layer)
            if mlp is not None:
                _shrink(mlp, kept_channels) if kept_channels.any() else drop_mlp(layer)
    _state_widths(model, describe(model), heads)
    return model


def _check_class(model: PreTrainedModel) -> None:
    """Refuse a class that cutting would replace by another, losing what it adds: a classifier's head, say."""
    pruned = PRUNED_CLASSES[model.config.model_type]
    # A model loaded with trust_remote_code has the class of that name from the file beside its weights.
    if type(model) is not stock_class(pruned) and type(model).__name__ != pruned.__name__:
        raise UnsupportedArchitectureError(
            f"model: a {type(model).__name__} cannot be cut; load it as {stock_class(pruned).__name__}"
        )


def _sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """New modules and parameters on the same memory: converting or training one model leaves the other's dtype
    and gradients alone.
    """
    # What stands in the memo is taken over as it is.
    memo: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    memo |= {id(old): _parameter(old, old.detach()) for old in model.parameters()}
    return copy.deepcopy(model, memo)


def _check_masks(view: PrunableModel, masks: GroupMasks) -> None:
    for name, blocks, kept in (("attention", view.attention, masks.attention), ("mlp", view.mlp, masks.mlp)):
        expected = [block.groups if block else 0 for block in blocks]
        given = [len(mask) for mask in kept]
        if expected != given:
            raise ValueError(f"masks.{name}: has lengths {given}, but the model's blocks have {expected} groups")


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


@dataclass(frozen=True)
class _HeadShape:
    """What all attention blocks of a model have in common, and keep."""

    head_dim: int
    heads_per_group: int


def _head_shape(view: PrunableModel) -> _HeadShape | None:
    """None where no attention block is left."""
    block = next((block for block in view.attention if block is not None), None)
    return None if block is None else _HeadShape(block.head_dim, block.heads_per_group)


def _state_widths(model: PreTrainedModel, view: PrunableModel, heads: _HeadShape | None) -> None:
    """Make class, configuration and the attention modules' attributes agree with the weights."""
    kv_heads = [block.groups if block else 0 for block in view.attention]
    channels = [block.groups if block else 0 for block in view.mlp]
    config = model.config
    config.__dict__.pop("auto_map", None)
    if heads is not None:
        config.head_dim = heads.head_dim
    uniform = len(set(kv_heads)) == len(set(channels)) == 1 and kv_heads[0] > 0 and channels[0] > 0
    if uniform and heads is not None and _statable(view, config, kv_heads[0] * heads.heads_per_group):
        config.per_layer_config = None
        config.__dict__.pop("per_layer_config", None)
        config.num_key_value_heads = kv_heads[0]
        config.num_attention_heads = kv_heads[0] * heads.heads_per_group
        config.intermediate_size = channels[0]
        model.__class__ = stock_class(PRUNED_CLASSES[config.model_type])
    else:
        if not _differs_in_width(homogeneous(config), kv_heads, channels):
            # transformers releases that do not know per_layer_config would load the stock model, with random weights
            # for the dropped blocks. A global width that fits no layer makes them refuse.
            config.intermediate_size = 0
        config.per_layer_config = _per_layer_config(view, kv_heads, channels, heads)
        # The same object with the class that knows per-layer widths: saving and reloading then just work.
        model.__class__ = PRUNED_CLASSES[config.model_type]
    _state_attention(model, view)


def _differs_in_width(dense: Any, kv_heads: list[int], channels: list[int]) -> bool:
    """Whether a block that exists has other than the global width."""
    return not (set(kv_heads) <= {0, dense.num_key_value_heads} and set(channels) <= {0, dense.intermediate_size})


def _per_layer_config(
    view: PrunableModel, kv_heads: list[int], channels: list[int], heads: _HeadShape | None
) -> dict[int | str, dict[str, Any]]:
    overrides: dict[int | str, dict[str, Any]] = {}
    for layer, (groups, width) in enumerate(zip(kv_heads, channels, strict=True)):
        skip = [name for name, count in (("attention", groups), ("mlp", width)) if count == 0]
        # A dropped attention block keeps one head in the cache, see DroppedAttention.
        overrides[layer] = {"num_key_value_heads": groups or 1, "intermediate_size": width}
        if heads is not None and view.architecture.per_layer_heads:
            overrides[layer]["num_attention_heads"] = (groups or 1) * heads.heads_per_group
        if skip:
            overrides[layer]["skip"] = skip
    return overrides


def _statable(view: PrunableModel, config: Any, heads: int) -> bool:
    """Whether the architecture's configuration class accepts this number of query heads."""
    return not view.architecture.heads_divide_hidden or config.hidden_size % heads == 0


def _state_attention(model: PreTrainedModel, view: PrunableModel) -> None:
    """Give each attention module its layer's configuration, which Phi-3's forward pass reads."""
    overrides = per_layer_overrides(model.config)
    dense = homogeneous(model.config)
    for block in view.attention:
        if block is None:
            continue
        module: Any = block.module
        own = overrides.get(block.layer)
        module.config = model.config if own is None else resolve_layer_config(dense, own)
        if hasattr(module, "num_key_value_heads"):
            module.num_key_value_heads = block.groups
