"""Causal language models whose decoder layers differ in width, as gradprune writes them.

This file is saved beside the weights of a pruned checkpoint and needs only torch and transformers:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

AutoConfig and AutoModel work in the same way. `config.json` uses transformers' `per_layer_config`, which maps a layer's
index to the values that differ from the model's global ones: `num_key_value_heads`; `num_attention_heads` (where it is
left out, `num_key_value_heads` times the model's ratio); `intermediate_size`; and `skip`, the names of the blocks
("attention", "mlp") that are gone, past which the residual stream is unchanged.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Model,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)


class PerLayerHeads:
    """Mixin for a stock `...Config` class: states both numbers of heads of every layer in `per_layer_config`.

    Stock classes check the global number of query heads, which transformers refuses to tell where layers differ; so
    they are given the global values alone to check.
    """

    def __post_init__(self, per_layer_config: Any = None, **kwargs: Any) -> None:
        """As the stock class; per_layer_config: {layer index: {name: value}}."""
        super().__post_init__(**kwargs)
        if per_layer_config:
            self.per_layer_config = {
                index: with_query_heads(self, overrides) for index, overrides in per_layer_config.items()
            }

    def validate(self) -> None:
        """The stock class's checks of the global values."""
        dense = homogeneous(self)
        dense.__class__ = stock_class(type(self))
        if hasattr(dense, "validate"):
            dense.validate()


class PrunedLlamaConfig(PerLayerHeads, LlamaConfig):
    """Llama with layers of different widths."""


class PrunedMistralConfig(PerLayerHeads, MistralConfig):
    """Mistral with layers of different widths."""


class PrunedQwen2Config(PerLayerHeads, Qwen2Config):
    """Qwen2 with layers of different widths."""


class PrunedQwen3Config(PerLayerHeads, Qwen3Config):
    """Qwen3 with layers of different widths."""


class PrunedPhi3Config(PerLayerHeads, Phi3Config):
    """Phi-3 with layers of different widths."""


PRUNED_CONFIGS: dict[str, Any] = {
    "llama": PrunedLlamaConfig,
    "mistral": PrunedMistralConfig,
    "qwen2": PrunedQwen2Config,
    "qwen3": PrunedQwen3Config,
    "phi3": PrunedPhi3Config,
}


class DroppedAttention(nn.Module):
    """An attention block that is gone: adds nothing to the residual stream.

    It still caches one head, never read, because a cache asks its first layers how many tokens it holds.
    """

    def __init__(self, head_dim: int, layer_idx: int) -> None:
        """head_dim: width of the cached head; layer_idx: the layer's index in the cache."""
        super().__init__()
        self.head_dim = head_dim
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Any = None,
        past_key_values: Any = None,
        cache_position: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: [B, T, H]; returns zeros like it, and no attention weights.

        Older transformers releases name the cache `past_key_values`.
        """
        cache = past_key_values if cache is None else cache
        if cache is not None:
            # Ones, because older static caches count the tokens whose key is not zero.
            ones = hidden_states.new_ones(hidden_states.shape[0], 1, hidden_states.shape[1], self.head_dim)
            cache.update(ones, ones, self.layer_idx, {"cache_position": cache_position})
        return torch.zeros_like(hidden_states), None


class DroppedMLP(nn.Module):
    """An MLP block that is gone: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: [B, T, H]; returns zeros like it."""
        return torch.zeros_like(hidden_states)


class BlockPlace(NamedTuple):
    """Where a kind of block is in a decoder layer of every class below.

    module, norm: attributes of the layer, the norm being the one before the block.
    rebuild: from the stock module, the layer's configuration and the layer's index, the module at its own width.
    stand_in: from the stock module, what takes its place where the block is gone.
    """

    module: str
    norm: str
    rebuild: Callable[[Any, PreTrainedConfig, int], nn.Module]
    stand_in: Callable[[Any], nn.Module]


BLOCKS: dict[str, BlockPlace] = {
    "attention": BlockPlace(
        "self_attn",
        "input_layernorm",
        rebuild=lambda stock, config, index: type(stock)(config, index),
        stand_in=lambda stock: DroppedAttention(stock.head_dim, stock.layer_idx),
    ),
    "mlp": BlockPlace(
        "mlp",
        "post_attention_layernorm",
        rebuild=lambda stock, config, _index: type(stock)(config),
        stand_in=lambda _stock: DroppedMLP(),
    ),
}


class PerLayerWidths:
    """Mixin for a stock `...Model` or `...ForCausalLM` class: builds each decoder layer at its own widths."""

    def __init__(self, config: PreTrainedConfig) -> None:
        """config: the architecture's own, with `per_layer_config`."""
        dense = homogeneous(config)
        layers = per_layer_overrides(config)
        check_overrides(layers)
        super().__init__(dense)
        body = getattr(self, "model", self)
        for index, overrides in layers.items():
            layer_config = resolve_layer_config(dense, overrides)
            for kind, place in BLOCKS.items():
                if kind in overrides.get("skip", ()):
                    drop_block(body.layers[index], kind)
                else:
                    stock = getattr(body.layers[index], place.module)
                    setattr(body.layers[index], place.module, place.rebuild(stock, layer_config, index))
        config._attn_implementation = dense._attn_implementation
        config.auto_map = auto_map(config.model_type)
        self.config: PreTrainedConfig = config
        body.config = config

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # The stock method reads the source file of the class it is called on, so it is called on the stock class.
        return bool(stock_class(cls)._can_set_attn_implementation())

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """The stock method, applied to the layers' own configurations too."""
        super().set_attn_implementation(*args, **kwargs)
        for layer in getattr(self, "model", self).layers:
            if hasattr(layer.self_attn, "config"):
                layer.self_attn.config._attn_implementation = self.config._attn_implementation


class PrunedLlamaModel(PerLayerWidths, LlamaModel):
    """Llama with layers of different widths, without a head."""


class PrunedMistralModel(PerLayerWidths, MistralModel):
    """Mistral with layers of different widths, without a head."""


class PrunedQwen2Model(PerLayerWidths, Qwen2Model):
    """Qwen2 with layers of different widths, without a head."""


class PrunedQwen3Model(PerLayerWidths, Qwen3Model):
    """Qwen3 with layers of different widths, without a head."""


class PrunedPhi3Model(PerLayerWidths, Phi3Model):
    """Phi-3 with layers of different widths, without a head."""


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

BASE_CLASSES = {
    "llama": PrunedLlamaModel,
    "mistral": PrunedMistralModel,
    "qwen2": PrunedQwen2Model,
    "qwen3": PrunedQwen3Model,
    "phi3": PrunedPhi3Model,
}

# Saving an object of a registered class writes this file, and its class into the configuration's auto_map.
AUTO_CLASSES: dict[str, dict[str, Any]] = {
    "AutoConfig": PRUNED_CONFIGS,
    "AutoModel": BASE_CLASSES,
    "AutoModelForCausalLM": PRUNED_CLASSES,
}
for _auto_class, _classes in AUTO_CLASSES.items():
    for _model_type, _class in _classes.items():
        _class.register_for_auto_class(_auto_class)
        if _auto_class != "AutoConfig":
            _class.config_class = PRUNED_CONFIGS[_model_type]


def auto_map(model_type: str) -> dict[str, str]:
    """`config.auto_map` of a pruned checkpoint: which class of this file each of transformers' auto classes takes."""
    return {auto: f"modeling_gradprune.{classes[model_type].__name__}" for auto, classes in AUTO_CLASSES.items()}


def per_layer_overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """`per_layer_config` by layer index, in transformers releases that do not know the attribute too."""
    return {int(index): overrides for index, overrides in (config.to_dict().get("per_layer_config") or {}).items()}


def check_overrides(layers: dict[int, dict[str, Any]]) -> None:
    """Refuse overrides that `PerLayerWidths` does not apply: ignoring them would load a different model."""
    known = {"num_key_value_heads", "num_attention_heads", "intermediate_size", "skip"}
    for index, overrides in layers.items():
        if unknown := sorted(set(overrides) - known) or sorted(set(overrides.get("skip", ())) - set(BLOCKS)):
            raise ValueError(
                f"per_layer_config: layer {index} has {unknown}; known are {sorted(known)} "
                f"and skip's {', '.join(BLOCKS)}"
            )


def stock_class(pruned: type) -> Any:
    """The architecture's own class, which `pruned` extends by per-layer widths."""
    return next(base for base in pruned.__mro__ if base.__module__.startswith("transformers.models."))


def homogeneous(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the configuration in which every layer has the global values."""
    dense = copy.copy(config)
    dense.per_layer_config = None
    return dense


def with_query_heads(dense: PreTrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides of one layer in which the number of KV heads has the number of query heads beside it."""
    if not isinstance(overrides, dict) or "num_key_value_heads" not in overrides:
        return overrides
    heads_per_group = dense.num_attention_heads // dense.num_key_value_heads
    return {"num_attention_heads": overrides["num_key_value_heads"] * heads_per_group, **overrides}


def resolve_layer_config(dense: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    """The homogeneous configuration of one layer."""
    config = copy.copy(dense)
    heads_per_group = dense.num_attention_heads // dense.num_key_value_heads
    config.num_key_value_heads = overrides.get("num_key_value_heads", dense.num_key_value_heads)
    config.num_attention_heads = config.num_key_value_heads * heads_per_group
    config.intermediate_size = overrides.get("intermediate_size", dense.intermediate_size)
    return config


def drop_block(layer: nn.Module, kind: str) -> None:
    """Remove a decoder layer's block of that kind (a key of `BLOCKS`) and the norm before it."""
    place = BLOCKS[kind]
    setattr(layer, place.module, place.stand_in(getattr(layer, place.module)))
    setattr(layer, place.norm, nn.Identity())
