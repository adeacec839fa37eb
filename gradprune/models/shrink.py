"""A tiny random model with the structure of a configuration, but few layers and small widths."""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from gradprune.models.modeling_gradprune import (
    EXPERTS,
    KV_HEADS,
    SHARED_WIDTHS,
    WIDTHS,
    causal_lm,
    homogeneous,
    stock_class,
    text_config,
)
from gradprune.models.modes import seeded
from gradprune.models.router import CHOSEN, SETS, SETS_CHOSEN

_MOST_PARAMETERS = 4_000_000
_HEADS, _HEAD_DIM = 6, 4
_HIDDEN = _HEADS * _HEAD_DIM
# Upper bounds of other values in configurations that a model's size or its widths depend on.
_SMALL: dict[str, int] = {
    "vocab_size": 61,
    "vocab_size_per_layer_input": 61,
    "max_position_embeddings": 64,
    "sliding_window": 4,
    "attention_chunk_size": 4,
    **dict.fromkeys(("moe_intermediate_size", *SHARED_WIDTHS), 8),
    **dict.fromkeys(EXPERTS, 6),
    "n_shared_experts": 1,
    **dict.fromkeys(CHOSEN, 2),
    **dict.fromkeys((*SETS, *SETS_CHOSEN), 1),
    "first_k_dense_replace": 1,
    "rotary_dim": _HEAD_DIM,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 12,
    "mamba_d_ssm": 48,
    "mamba_d_state": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "query_pre_attn_scalar": 4,
    "hidden_size_per_layer_input": 0,
    "lru_width": _HIDDEN,
}


def tiny_model(config: PreTrainedConfig, model_class: type | None) -> PreTrainedModel:
    """Build a random fp64 model, in evaluation mode, with the structure that `config` describes; always the same one.

    It has two layers of each type, or one if there is only one; see `_layers_kept`. In a vision-language model only
    the modules that text passes through have weights.

    Args:
        config: the configuration, of any size.
        model_class: the model's class; by default transformers' causal LM of this configuration.

    Raises:
        ValueError: the shrunk configuration still describes more than 4 million parameters.
        Exception: anything that transformers raises if no model can be built from the shrunk configuration.
    """
    small = shrunk(config)
    stock: Any = model_class if model_class is not None else getattr(transformers, str(causal_lm(config.model_type)))
    with init_empty_weights():
        model: Any = stock._from_config(small, dtype=torch.float32)
    whole = text_config(small) is small
    parameters = sum(parameter.numel() for parameter in (model if whole else model.get_decoder()).parameters())
    if parameters > _MOST_PARAMETERS:
        raise ValueError(f"its configuration cannot be made small: {parameters:,} parameters are left")
    with seeded(0):
        if whole:
            model = stock._from_config(small, dtype=torch.float32)
        else:
            _fill_text_part(model)
        return with_random_weights(model)


def vision_left_empty(config: PreTrainedConfig) -> AbstractContextManager[Any]:
    """Context manager in which a vision-language model is built without weights, and any other model with weights."""
    return nullcontext() if text_config(config) is config else init_empty_weights()


def _fill_text_part(model: Any) -> None:
    """Give weights to the decoder and the head of a vision-language model that was built without weights."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    filled = type(decoder)._from_config(text_config(model.config), dtype=torch.float32)
    decoder.load_state_dict(filled.state_dict(), assign=True)
    for name, parameter in list(head.named_parameters()):
        setattr(head, name, nn.Parameter(torch.zeros(parameter.shape)))
    model.tie_weights()


@torch.no_grad()
def with_random_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model in fp64 and evaluation mode, with new weights drawn in place from torch's random generator."""
    model = model.double().eval()
    for parameter in model.parameters():
        if parameter.is_meta:
            continue
        # One-dimensional parameters, such as the weights of norms, stay near their initial values.
        noise = torch.randn_like(parameter) * 0.2
        parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration with small sizes, as an object of its stock class; structure and options stay the same.

    For a vision-language model, only the decoder's part is made small.
    """
    dense = homogeneous(config)
    dense.__class__ = stock_class(type(dense))
    if text_config(dense) is not dense:
        dense.text_config = shrunk(text_config(dense))
        rope = getattr(dense.text_config, "rope_parameters", None)
        if isinstance(rope, dict) and "rope_theta" in rope:
            # All angles of a head follow the first of an image's three coordinates, which are equal in text.
            rope["mrope_section"] = [int(_HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2, 0, 0]
        for name in ("quantization_config", "auto_map", "dtype", "transformers_version"):
            dense.__dict__.pop(name, None)
        return dense
    # Values by their common names; attribute_map maps these to an architecture's own names.
    own_names = dense.attribute_map
    common = {own: name for name, own in own_names.items()}
    values = {common.get(name, name): value for name, value in dense.to_dict().items()}
    layers = _layers_kept(values)
    found = _with_layers(values, layers) | {
        name: min(small, values[name]) for name, small in _SMALL.items() if isinstance(values.get(name), int)
    }
    found |= {"num_hidden_layers": len(layers), "hidden_size": _HIDDEN, "num_attention_heads": _HEADS}
    ratio = 1 if _kv_heads(values) in (None, values.get("num_attention_heads")) else 2
    found |= {name: _HEADS // ratio for name in KV_HEADS if name in values}
    found |= {name: 10 for name in WIDTHS if isinstance(values.get(name), int)}
    if "head_dim" in values:
        found["head_dim"] = _HEAD_DIM
    found |= {name: None if name == "pad_token_id" else 1 for name in _TOKENS if name in values}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(name), dict):
            found[name] = _plain_rope(values[name])
    for name in ("quantization_config", "auto_map", "per_layer_config", "dtype", "transformers_version"):
        found.pop(name, None)
    made: PreTrainedConfig = type(dense).from_dict({own_names.get(name, name): value for name, value in found.items()})
    # Grouped matrix products, the default for experts, do not support fp64.
    made._experts_implementation = "eager"
    return made


_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _kv_heads(values: dict[str, Any]) -> Any:
    return next((values[name] for name in KV_HEADS if values.get(name) is not None), None)


def _layers_kept(values: dict[str, Any]) -> list[int]:
    """Return the first two layers of each of the first six types: the self-test drops one and narrows the other."""
    count = values.get("num_hidden_layers")
    if not isinstance(count, int):
        raise ValueError("its configuration states no num_hidden_layers")
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == count]
    of_type: dict[tuple[Any, ...], list[int]] = {}
    for layer in range(count):
        of_type.setdefault(tuple(str(each[layer]) for each in lists), []).append(layer)
    return sorted(layer for layers in list(of_type.values())[:6] for layer in layers[:2])


def _with_layers(values: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """Return a copy of the values in which lists with one entry per layer have only the entries of `layers`."""
    count = values["num_hidden_layers"]
    return {
        name: [value[layer] for layer in layers] if isinstance(value, list) and len(value) == count else value
        for name, value in copy.deepcopy(values).items()
    }


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Return settings of rotary embeddings without lists of factors, whose length depends on the width of a head."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {name: _plain_rope(value) if isinstance(value, dict) else value for name, value in rope.items()}
    if not any(isinstance(value, list) for value in rope.values()):
        return rope
    kept = {name: value for name, value in rope.items() if name in ("rope_theta", "partial_rotary_factor")}
    return {"rope_type": "default", **kept}
