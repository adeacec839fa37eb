"""Causal language models whose decoder layers differ in width, for MLX, as gradprune writes them.

This file is saved beside the weights of a pruned checkpoint, whose `config.json` names it as `model_file`, and needs
only mlx and mlx-lm:

    mlx_lm.load(folder, trust_remote_code=True)

It builds mlx-lm's own model of the architecture and then gives each layer in `per_layer_config` its own widths.
"""

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# The module of mlx-lm that implements each `model_type`.
MODULES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3"}


class DroppedAttention(nn.Module):
    """Stands in for a removed attention block: adds nothing to the residual stream.

    It still caches one head, which is never read, because mlx-lm asks the cache how many tokens it holds.
    """

    def __init__(self, head_dim: int) -> None:
        """head_dim: width of the cached head."""
        super().__init__()
        self.head_dim = head_dim

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Return zeros of the shape of x, [B, T, H]."""
        if cache is not None:
            zeros = mx.zeros((x.shape[0], 1, x.shape[1], self.head_dim), x.dtype)
            cache.update_and_fetch(zeros, zeros)
        return mx.zeros_like(x)


class DroppedMLP(nn.Module):
    """Stands in for a removed MLP block: adds nothing to the residual stream."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return zeros of the shape of x, [B, T, H]."""
        return mx.zeros_like(x)


class ModelArgs:
    """The content of `config.json`."""

    def __init__(self, config: dict[str, Any]) -> None:
        """config: the content of `config.json` as a mapping."""
        self.config = config

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelArgs":
        """Return the arguments for a configuration; mlx-lm creates them by this method."""
        return cls(config)


def Model(args: ModelArgs) -> nn.Module:
    """Build the model, with random weights."""
    layers = {int(index): own for index, own in args.config["per_layer_config"].items()}
    config = _homogeneous(args.config)
    module = importlib.import_module(f"mlx_lm.models.{MODULES[config['model_type']]}")
    model = module.Model(module.ModelArgs.from_dict(config))
    for index, own in layers.items():
        layer = model.layers[index]
        if "attention" in own.get("skip", ()):
            layer.self_attn = DroppedAttention(config["head_dim"])
            layer.input_layernorm = nn.Identity()
        else:
            _set_heads(layer.self_attn, own.get("num_key_value_heads", config["num_key_value_heads"]), config)
        if "mlp" in own.get("skip", ()):
            layer.mlp = DroppedMLP()
            layer.post_attention_layernorm = nn.Identity()
        else:
            _set_channels(layer.mlp, own.get("intermediate_size", config["intermediate_size"]), config["hidden_size"])
    return model


def _homogeneous(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration, in the form that mlx-lm's modules read, of a model whose layers all have the global widths."""
    rope = config.get("rope_parameters") or {}
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if config["model_type"] in ("qwen2", "phi3") and head_dim * heads != config["hidden_size"]:
        raise ValueError(
            f"config.json: mlx-lm computes this architecture only if num_attention_heads ({heads}) times head_dim "
            f"({head_dim}) is hidden_size ({config['hidden_size']})"
        )
    given = {
        **config,
        "head_dim": head_dim,
        # The stored global width is 0 if it fits no layer, but mlx-lm has to build the layers before they are resized.
        "intermediate_size": max(1, config["intermediate_size"]),
        "rope_theta": config.get("rope_theta") or rope["rope_theta"],
    }
    if rope.get("rope_type", "default") != "default":
        given["rope_scaling"] = {"type": rope["rope_type"], **rope}
    return given


def _set_heads(attention: Any, groups: int, config: dict[str, Any]) -> None:
    """Give an attention block `groups` KV heads and their query heads."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    queries = groups * (attention.n_heads // attention.n_kv_heads)
    attention.n_heads, attention.n_kv_heads = queries, groups
    rows = {"q_proj": queries, "k_proj": groups, "v_proj": groups, "qkv_proj": queries + 2 * groups}
    for name, heads in rows.items():
        if name in attention:
            attention[name] = _linear(attention[name], hidden, heads * head_dim)
    attention.o_proj = _linear(attention.o_proj, queries * head_dim, hidden)


def _set_channels(mlp: Any, channels: int, hidden: int) -> None:
    """Give an MLP block `channels` channels."""
    for name, rows in {"gate_proj": channels, "up_proj": channels, "gate_up_proj": 2 * channels}.items():
        if name in mlp:
            mlp[name] = _linear(mlp[name], hidden, rows)
    mlp.down_proj = _linear(mlp.down_proj, channels, hidden)


def _linear(stock: Any, inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias="bias" in stock)
