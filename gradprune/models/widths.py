"""A model's configuration says how wide its blocks are: which widths it can say, and making it agree with the weights.

Attention's widths are numbers of heads: KV heads, and query heads at the model's fixed ratio. An MLP's is its number of
channels.
"""

from typing import Any

from transformers import PreTrainedModel

from gradprune.models.blocks import Block, PrunableModel
from gradprune.models.modeling_gradprune import (
    PRUNED_CLASSES,
    PRUNED_CONFIGS,
    auto_map,
    homogeneous,
    per_layer_overrides,
    resolve_layer_config,
    stock_class,
)


def plain_widths(view: PrunableModel) -> dict[str, frozenset[int]]:
    """By kind, the numbers of groups that all blocks of a plain checkpoint of this architecture may have.

    Kinds that accept any number are left out.
    """
    first = _any_attention(view)
    if not view.architecture.heads_divide_hidden or first is None:
        return {}
    hidden = view.model.config.hidden_size
    return {first.kind.name: frozenset(n for n in range(1, first.groups + 1) if _divides(n, first, hidden))}


def state_widths(view: PrunableModel, before: PrunableModel) -> None:
    """Make the model's class, its configuration and its attention modules' attributes agree with its weights.

    Args:
        view: the model as its weights are now.
        before: as its configuration says; what its attention heads have in common is read from here, because `view`
            may have no attention block left.
    """
    model = view.model
    config = model.config
    config.__dict__.pop("auto_map", None)
    attention = _any_attention(before)
    if attention is not None:
        config.head_dim = attention.head_dim
    kv_groups, channels = _widths(view, "attention"), _widths(view, "mlp")
    if _is_plain(view, attention, kv_groups, channels):
        assert attention is not None
        config.per_layer_config = None
        config.__dict__.pop("per_layer_config", None)
        config.__dict__.pop("allow_global_per_layer_attribute_access", None)
        config.num_key_value_heads = kv_groups[0]
        config.num_attention_heads = kv_groups[0] * attention.heads_per_group
        config.intermediate_size = channels[0]
        model.__class__ = stock_class(PRUNED_CLASSES[config.model_type])
        config.__class__ = stock_class(PRUNED_CONFIGS[config.model_type])
    else:
        if not _differs_in_width(homogeneous(config), kv_groups, channels):
            # transformers releases that do not know per_layer_config would load the stock model, with random weights
            # for the dropped blocks. A global width that fits no layer makes them refuse.
            config.intermediate_size = 0
        config.per_layer_config = _per_layer_config(view, attention, kv_groups, channels)
        # The same objects with the classes that know per-layer widths: saving and reloading then just work.
        model.__class__ = PRUNED_CLASSES[config.model_type]
        config.__class__ = PRUNED_CONFIGS[config.model_type]
        config.auto_map = auto_map(config.model_type)
        if not view.architecture.per_layer_heads:
            # For the stock class, with which AutoTokenizer reads config.json where remote code is off.
            config.allow_global_per_layer_attribute_access = True
    _state_attention(model, view)


def _any_attention(view: PrunableModel) -> Block | None:
    """An attention block, for what all of them have in common: the head width and the query heads per KV head."""
    return next((block for block in view.of_kind("attention") if block is not None), None)


def _widths(view: PrunableModel, kind: str) -> list[int]:
    """Groups per decoder layer, 0 where the block does not exist."""
    return [block.groups if block else 0 for block in view.of_kind(kind)]


def _divides(kv_groups: int, attention: Block, hidden_size: int) -> bool:
    return hidden_size % (kv_groups * attention.heads_per_group) == 0


def _is_plain(view: PrunableModel, attention: Block | None, kv_groups: list[int], channels: list[int]) -> bool:
    """Whether the architecture's own configuration can say it: no block is gone, all layers are alike."""
    if attention is None or min(*kv_groups, *channels) == 0 or len(set(kv_groups)) > 1 or len(set(channels)) > 1:
        return False
    hidden = view.model.config.hidden_size
    return not view.architecture.heads_divide_hidden or _divides(kv_groups[0], attention, hidden)


def _differs_in_width(dense: Any, kv_groups: list[int], channels: list[int]) -> bool:
    """Whether a block that exists has other than the global width."""
    return not (set(kv_groups) <= {0, dense.num_key_value_heads} and set(channels) <= {0, dense.intermediate_size})


def _per_layer_config(
    view: PrunableModel, attention: Block | None, kv_groups: list[int], channels: list[int]
) -> dict[int | str, dict[str, Any]]:
    overrides: dict[int | str, dict[str, Any]] = {}
    for layer, (groups, width) in enumerate(zip(kv_groups, channels, strict=True)):
        # A dropped attention block keeps one head in the cache, see DroppedAttention.
        own: dict[str, Any] = {"num_key_value_heads": groups or 1, "intermediate_size": width}
        if attention is not None:
            own["num_attention_heads"] = (groups or 1) * attention.heads_per_group
        existing = {block.kind.name for block in view.of_layer(layer)}
        if skip := [layout.kind for layout in view.architecture.blocks if layout.kind not in existing]:
            own["skip"] = skip
        overrides[layer] = own
    return overrides


def _state_attention(model: PreTrainedModel, view: PrunableModel) -> None:
    """Give each attention module its layer's configuration, which Phi-3's forward pass reads."""
    overrides = per_layer_overrides(model.config)
    dense = homogeneous(model.config)
    for block in view.of_kind("attention"):
        if block is None:
            continue
        module: Any = block.module
        own = overrides.get(block.layer)
        module.config = model.config if own is None else resolve_layer_config(dense, own)
        if hasattr(module, "num_key_value_heads"):
            module.num_key_value_heads = block.groups
