"""Causal language models whose decoder layers differ in width, as gradprune writes them.

This file stands beside the weights of a pruned checkpoint and needs only torch and transformers:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`config.json` has transformers' `per_layer_config`: a map from layer index to what differs from the model's
global values: `num_key_value_heads`, `num_attention_heads` (left out where the architecture's configuration class
does not accept it there: it is then `num_key_value_heads` times the model's own ratio), `intermediate_size`,
and `skip`, a list with "attention" or "mlp" for a block that is gone and passes the residual stream through.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    Phi3ForCausalLM,
    PreTrainedConfig,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)


class DroppedAttention(nn.Module):
    """An attention block that is gone: adds nothing to the residual stream.

    Caches ask their first layers how many tokens they hold, so it still stores a single head, which nobody reads.
    """

    def __init__(self, head_dim: int, layer_idx: int) -> None:
        """head_dim: width of the cached head; layer_idx: this layer's place in the cache."""
        super().__init__()
        self.head_dim = head_dim
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: torch.Tensor, past_key_values: Any = None, cache_position: Any = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: [B, T, H]; returns zeros like it, and no attention weights."""
        if past_key_values is not None:
            # Not zeros: older static caches place tokens by cache_position and count those whose key is not zero.
            ones = hidden_states.new_ones(hidden_states.shape[0], 1, hidden_states.shape[1], self.head_dim)
            past_key_values.update(ones, ones, self.layer_idx, {"cache_position": cache_position})
        return torch.zeros_like(hidden_states), None


class DroppedMLP(nn.Module):
    """An MLP block that is gone: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: [B, T, H]; returns zeros like it."""
        return torch.zeros_like(hidden_states)


class PerLayerWidths:
    """Mixin for a stock `...ForCausalLM` class: builds each decoder layer at the widths its configuration gives it."""

    def __init__(self, config: PreTrainedConfig) -> None:
        """config: the architecture's own, with `per_layer_config`."""
        dense = homogeneous(config)
        layers = per_layer_overrides(config)
        check_overrides(layers)
        super().__init__(dense)
        for index, overrides in layers.items():
            layer = self.model.layers[index]
            layer_config = resolve_layer_config(dense, overrides)
            if "attention" in overrides.get("skip", ()):
                drop_attention(layer)
            else:
                layer.self_attn = type(layer.self_attn)(layer_config, index)
            if "mlp" in overrides.get("skip", ()):
                drop_mlp(layer)
            else:
                layer.mlp = type(layer.mlp)(layer_config)
        config._attn_implementation = dense._attn_implementation
        self.config = self.model.config = config

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Looks for the attention's code in the file of the class it is called on, which is the stock one's.
        return bool(stock_class(cls)._can_set_attn_implementation())

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As the stock method, for the layers' own configurations too."""
        super().set_attn_implementation(*args, **kwargs)
        for layer in self.model.layers:
            if hasattr(layer.self_attn, "config"):
                layer.self_attn.config._attn_implementation = self.config._attn_implementation


class PrunedLlamaForCausalLM(PerLayerWidths, LlamaForCausalLM):
    """Llama with layers of different widths."""


class PrunedMistralForCausalLM(PerLayerWidths, MistralForCausalLM):
    """Mistral with layers of different widths."""


class PrunedQwen2ForCausalLM(PerLayerWidths, Qwen2ForCausalLM):
    """Qwen2 with layers of different widths."""


class PrunedQwen3ForCausalLM(PerLayerWidths, Qwen3ForCausalLM):
    """Qwen3 with layers of different widths."""


class PrunedPhi3ForCausalLM(PerLayerWidths, Phi3ForCausalLM):
    """Phi-3 with layers of different widths."""


PRUNED_CLASSES = {
    "llama": PrunedLlamaForCausalLM,
    "mistral": PrunedMistralForCausalLM,
    "qwen2": PrunedQwen2ForCausalLM,
    "qwen3": PrunedQwen3ForCausalLM,
    "phi3": PrunedPhi3ForCausalLM,
}

# Saving a model of a registered class writes this file and the configuration's auto_map with it.
for _pruned_class in PRUNED_CLASSES.values():
    _pruned_class.register_for_auto_class("AutoModelForCausalLM")


def per_layer_overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """`per_layer_config` by layer index, also under transformers releases that do not know the attribute."""
    return {int(index): overrides for index, overrides in (config.to_dict().get("per_layer_config") or {}).items()}


def check_overrides(layers: dict[int, dict[str, Any]]) -> None:
    """Refuse what `PerLayerWidths` would not apply: ignored, it would make another model than the one saved."""
    known = {"num_key_value_heads", "num_attention_heads", "intermediate_size", "skip"}
    for index, overrides in layers.items():
        if unknown := sorted(set(overrides) - known) or sorted(set(overrides.get("skip", ())) - {"attention", "mlp"}):
            raise ValueError(
                f"per_layer_config: layer {index} has {unknown}; known are {sorted(known)} and skip's attention, mlp"
            )


def stock_class(pruned: type) -> Any:
    """The architecture's own class, of which `pruned` is the variant with per-layer widths."""
    return next(base for base in pruned.__mro__ if base.__module__.startswith("transformers.models."))


def homogeneous(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the configuration in which every layer has the global values."""
    dense = copy.copy(config)
    dense.per_layer_config = None
    return dense


def resolve_layer_config(dense: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    """The homogeneous configuration of one layer."""
    config = copy.copy(dense)
    heads_per_group = dense.num_attention_heads // dense.num_key_value_heads
    config.num_key_value_heads = overrides.get("num_key_value_heads", dense.num_key_value_heads)
    config.num_attention_heads = config.num_key_value_heads * heads_per_group
    config.intermediate_size = overrides.get("intermediate_size", dense.intermediate_size)
    return config


def drop_attention(layer: nn.Module) -> None:
    """Remove a decoder layer's attention block and the norm before it."""
    layer.self_attn = DroppedAttention(layer.self_attn.head_dim, layer.self_attn.layer_idx)
    layer.input_layernorm = nn.Identity()


def drop_mlp(layer: nn.Module) -> None:
    """Remove a decoder layer's MLP block and the norm before it."""
    layer.mlp = DroppedMLP()
    layer.post_attention_layernorm = nn.Identity()
