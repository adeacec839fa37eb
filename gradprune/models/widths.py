"""The widths of blocks in a model's configuration: which ones it can state, and making it agree with the weights.

The widths of attention are numbers of heads: KV heads, and query heads at the model's fixed ratio. The width of an MLP
or of an expert is its number of channels. If whole experts are pruned, the configuration states their number.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from gradprune.models.blocks import Block, LinearBlock, PrunableModel
from gradprune.models.experts import ExpertChannels
from gradprune.models.modeling_gradprune import (
    EXPERT_WIDTHS,
    EXPERTS,
    SHARED_WIDTHS,
    auto_map,
    build_layer,
    homogeneous,
    kv_heads_name,
    name_in,
    per_layer_overrides,
    pruned_class,
    state_dtype,
    stock_class,
    text_config,
    weight_of,
    width_name,
)

# Types of the attributes of a module that can depend on its widths, and attributes that are never changed.
_PLAIN = (bool, int, float, str, tuple, type(None))
_UNTOUCHED = ("training", "layer_idx")


def plain_widths(view: PrunableModel) -> dict[str, frozenset[int]]:
    """By kind, the numbers of groups that each set of a block can have in a plain checkpoint of this architecture.

    Kinds for which any number is possible are left out.
    """
    found = {
        block.kind.name: frozenset(range(block.min_kept, block.groups // block.sets + 1))
        for block in view.blocks
        if block.min_kept > 1
    }
    mlp = next((block for block in view.of_kind("mlp") if block is not None), None)
    if mlp is not None and not _follows_width(view, mlp):
        found[mlp.kind.name] = frozenset({mlp.groups})
    first = _attention(view)
    return found if first is None else found | _attention_widths(view, first)


def _follows_width(view: PrunableModel, mlp: LinearBlock) -> bool:
    """Whether a stock layer's MLP has the width in the configuration; some classes derive it in their own way."""
    dense = _stock_config(view.model)
    other = mlp.groups + 1
    try:
        with torch.device("meta"):
            built: Any = type(view.layers[mlp.layer])(_with(dense, {width_name(dense): other}), mlp.layer)
    except ValueError:
        # The class refuses the configuration for another reason, its number of heads.
        return True
    output = getattr(built.get_submodule(mlp.path), mlp.output.path)
    return bool(weight_of(output).shape[1] == other)


def _attention_widths(view: PrunableModel, first: LinearBlock) -> dict[str, frozenset[int]]:
    """Return the entry of `plain_widths` for attention, empty if any number is possible; first: an attention block."""
    dense = _stock_config(view.model)
    _state_head_dim(dense, first)
    layer = view.layers[first.layer]
    counts = range(1, first.groups + 1)
    stated = ((n, _with(dense, _own_widths(dense, {"attention": n}, first))) for n in counts)
    fitting = frozenset(n for n, config in stated if _is_valid(config) and _has_heads(layer, config, first, n))
    return {} if len(fitting) == first.groups else {first.kind.name: fitting}


def state_widths(view: PrunableModel, before: PrunableModel) -> None:
    """Make the model's class, its configuration and its layers' attributes agree with its weights.

    Args:
        view: the model with its current weights.
        before: the model as its configuration still describes it. The properties that all attention blocks share are
            read from here, because `view` may have no attention block left.
    """
    model = view.model
    # In a vision-language model `config` is the decoder's part of the whole configuration; otherwise both are the same.
    whole, config = model.config, text_config(model.config)
    whole.__dict__.pop("auto_map", None)
    state_dtype(config)
    attention = _attention(before)
    _state_head_dim(config, attention)
    plain = _plain_widths(view, attention)
    if plain is not None:
        config.per_layer_config = None
        config.__dict__.pop("per_layer_config", None)
        config.__dict__.pop("allow_global_per_layer_attribute_access", None)
        for name, value in plain.items():
            setattr(config, name, value)
        model.__class__ = stock_class(type(model))
        whole.__class__ = stock_class(type(whole))
    else:
        dense = _dense(model)
        width = width_name(dense)
        stated = {block.layer for block in view.blocks if block.kind.name == "mlp"}
        stated |= {key.layer for key in view.dropped if key.kind == "mlp"}
        if hasattr(dense, width) and len(stated) == len(view.layers) and not _differs_in_width(view, before, dense):
            # transformers releases without per_layer_config would load the stock model, with random weights for the
            # dropped blocks. A global width that fits no layer makes them refuse the checkpoint.
            setattr(config, width, 0)
        config.per_layer_config = _per_layer_config(view, attention)
        # The objects stay the same but get classes that support per-layer widths, so saving and reloading just work.
        stock_config = stock_class(type(whole))
        model.__class__ = pruned_class(stock_class(type(model)), stock_config)
        whole.__class__ = pruned_class(stock_config)
        whole.auto_map = auto_map(whole.model_type)
        if not _stock_can_read(config):
            # For the stock class, with which AutoTokenizer reads config.json if remote code is not allowed.
            config.allow_global_per_layer_attribute_access = True
    _state_attributes(view)


def _dense(model: PreTrainedModel) -> Any:
    """A copy of the decoder's configuration in which every layer has the global values."""
    return homogeneous(text_config(model.config))


def _stock_config(model: PreTrainedModel) -> Any:
    """Return `_dense` with transformers' own configuration class of the architecture."""
    dense = _dense(model)
    dense.__class__ = stock_class(type(dense))
    return dense


def _attention(view: PrunableModel) -> LinearBlock | None:
    """Return an attention block, for the properties that all of them share; None if there is none."""
    return next((block for block in view.of_kind("attention") if block is not None), None)


def _width_of(block: Block) -> int:
    """The number that a configuration states for a block: its groups, or the channels of each of its experts."""
    return block.channels if isinstance(block, ExpertChannels) else block.groups


def _state_head_dim(config: PreTrainedConfig, attention: LinearBlock | None) -> None:
    """Set `head_dim` in the configuration; otherwise classes would compute it from the number of heads."""
    if attention is not None and not isinstance(getattr(type(config), "head_dim", None), property):
        config.head_dim = attention.head_dim


def _own_widths(config: PreTrainedConfig, groups: dict[str, int], attention: LinearBlock | None) -> dict[str, int]:
    """Return the configuration's attributes, and their values, that state the given widths of blocks.

    groups: for each kind, the number of groups of a block; for "expert_channels", the number of channels per expert.
    """
    stated: dict[str, int] = {}
    if "attention" in groups and attention is not None:
        if (name := kv_heads_name(config)) is not None:
            stated[name] = groups["attention"]
        stated["num_attention_heads"] = groups["attention"] * attention.heads_per_group
    if "mlp" in groups:
        stated[width_name(config)] = groups["mlp"]
    if "expert_channels" in groups and (name := name_in(config, EXPERT_WIDTHS)) is not None:
        stated[name] = groups["expert_channels"]
    if "experts" in groups and (name := name_in(config, EXPERTS)) is not None:
        stated[name] = groups["experts"]
    if "shared_experts" in groups and (name := name_in(config, SHARED_WIDTHS)) is not None:
        stated[name] = groups["shared_experts"]
    return stated


def _with(dense: PreTrainedConfig, widths: dict[str, int]) -> PreTrainedConfig:
    """Return a copy of the configuration with these widths."""
    config = copy.copy(dense)
    for name, value in widths.items():
        setattr(config, name, value)
    return config


def _is_valid(config: Any) -> bool:
    """Whether the configuration's class accepts its values."""
    if not hasattr(config, "validate"):
        return True
    try:
        config.validate()
    except Exception:  # a class of huggingface_hub, which wraps a ValueError
        return False
    return True


def _has_heads(layer: nn.Module, config: PreTrainedConfig, attention: LinearBlock, groups: int) -> bool:
    """Whether a stock layer of `config` has `groups` attention groups; some classes make it as wide as the model."""
    try:
        with torch.device("meta"):
            built: Any = type(layer)(config, attention.layer)
    except ValueError:
        return False
    output = getattr(getattr(built, attention.path), attention.output.path)
    return bool(weight_of(output).shape[1] == groups * attention.output.columns)


def _plain_widths(view: PrunableModel, attention: LinearBlock | None) -> dict[str, int] | None:
    """Return what the stock configuration states for all widths; None if it cannot, e.g. because widths differ."""
    groups: dict[str, set[int]] = {}
    for block in view.blocks:
        groups.setdefault(block.kind.name, set()).add(_width_of(block))
    if view.dropped or any(len(found) > 1 for found in groups.values()):
        return None
    dense = _stock_config(view.model)
    widths = _own_widths(dense, {kind: found.pop() for kind, found in groups.items()}, attention)
    config = _with(dense, widths)
    return widths if _is_valid(config) and _builds(view, config) else None


def _builds(view: PrunableModel, config: PreTrainedConfig) -> bool:
    """Whether stock layers built from `config` have parameters of the same shapes as the model's layers."""
    for index, layer in enumerate(view.layers):
        try:
            with torch.device("meta"):
                stock = type(layer)(config, index)
        except ValueError:
            return False
        shapes = {name: parameter.shape for name, parameter in stock.named_parameters()}
        if shapes != {name: parameter.shape for name, parameter in layer.named_parameters()}:
            return False
    return True


def _differs_in_width(view: PrunableModel, before: PrunableModel, dense: PreTrainedConfig) -> bool:
    """Whether an existing block has a width other than the global one in `dense`."""
    attention = _attention(before)
    return any(
        getattr(dense, name, None) != value
        for block in view.blocks
        for name, value in _own_widths(dense, {block.kind.name: _width_of(block)}, attention).items()
    )


def _per_layer_config(view: PrunableModel, attention: LinearBlock | None) -> dict[int | str, dict[str, Any]]:
    dense = _dense(view.model)
    overrides: dict[int | str, dict[str, Any]] = {}
    for layer in range(len(view.layers)):
        groups = {block.kind.name: _width_of(block) for block in view.of_layer(layer)}
        skip = [kind for kind in ("attention", "mlp") if (layer, kind) in view.dropped]
        # A dropped attention block still caches one head, see DroppedAttention.
        widths = {**groups, **{kind: int(kind == "attention") for kind in skip}}
        own: dict[str, Any] = dict(_own_widths(dense, widths, attention))
        if skip:
            own["skip"] = skip
        if own:
            overrides[layer] = own
    return overrides


def _stock_can_read(config: PreTrainedConfig) -> bool:
    """Whether the stock class accepts a configuration whose layers differ."""
    try:
        stock_class(type(config)).from_dict(config.to_dict())
    except Exception:  # classes of transformers that earlier releases do not have
        return False
    return True


def _state_attributes(view: PrunableModel) -> None:
    """Give the modules of each layer the attributes that they would have if they were built at the layer's widths."""
    config = text_config(view.model.config)
    overrides = per_layer_overrides(config)
    dense = homogeneous(config) if overrides else config
    touched = {block.layer for block in view.blocks} | {key.layer for key in view.dropped}
    for index in sorted(touched):
        layer = view.layers[index]
        # A width of 0 marks a removed block; it is left out, because torch warns of linear layers without weights.
        own = {name: value for name, value in overrides.get(index, {}).items() if value != 0}
        with torch.device("meta"):
            built = build_layer(layer, dense, own, index)
        for name, module in layer.named_modules():
            _adopt(module, built, name)


def _adopt(module: nn.Module, built: nn.Module, name: str) -> None:
    """Copy the plain attributes of the module `name` in `built` to `module`, if both are of the same class."""
    try:
        other = built.get_submodule(name)
    except AttributeError:
        return
    if type(other) is not type(module):
        return
    for attribute, value in vars(other).items():
        if attribute == "config":
            module.config = value
        elif isinstance(value, _PLAIN) and not attribute.startswith("_") and attribute not in _UNTOUCHED:
            setattr(module, attribute, value)
