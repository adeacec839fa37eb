"""Decoder layers' weights by projection, with fused projections split, MLPs padded and removed blocks made zero."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradprune.models import LinearBlock, PrunableModel
from gradprune.models.modeling_gradprune import norms_of

# A weight is its shape and the function that computes its tensor when it is written. `Weights` holds weights by name,
# e.g. "q.weight", "down.bias", "attn_norm.weight".
Weight = tuple[tuple[int, ...], Callable[[], Tensor]]
Weights = dict[str, Weight]

# Channels of the zero MLP that replaces a removed one: a multiple of the block size of every type except for k-quants.
_ZERO_CHANNELS = 32


@dataclass(frozen=True)
class Layer:
    """The widths and weights of one decoder layer; a removed block has no weights and 0 heads or channels.

    heads, kv_heads: number of query heads and of KV heads. channels: number of MLP channels.
    weights: weights of the projections q, k, v, o, gate, up, down and of attn_norm, ffn_norm, q_norm, k_norm.
    """

    heads: int
    kv_heads: int
    channels: int
    weights: Weights

    def with_attention(self, hidden: int, head_dim: int, *, qk_norm: bool) -> "Layer":
        """Return this layer; if its attention is removed, with one head of zero weights, whose output is zero."""
        if self.heads:
            return self
        zeros = {f"{name}.weight": _zeros(head_dim, hidden) for name in ("q", "k", "v")}
        zeros["o.weight"] = _zeros(hidden, head_dim)
        norms = {"attn_norm.weight": _ones(hidden)}
        if qk_norm:
            norms |= {"q_norm.weight": _ones(head_dim), "k_norm.weight": _ones(head_dim)}
        return replace(self, heads=1, kv_heads=1, weights={**norms, **zeros, **self.weights})

    def with_mlp(self, hidden: int) -> "Layer":
        """Return this layer; if its MLP is removed, with a zero MLP, as deci skips the rest of a layer without one."""
        if self.channels:
            return self
        zeros = {f"{name}.weight": _zeros(_ZERO_CHANNELS, hidden) for name in ("gate", "up")}
        zeros["down.weight"] = _zeros(hidden, _ZERO_CHANNELS)
        return replace(
            self, channels=_ZERO_CHANNELS, weights={**self.weights, "ffn_norm.weight": _ones(hidden), **zeros}
        )


def read_layers(view: PrunableModel, width_multiple: int) -> list[Layer]:
    """Return the model's layers, with zero channels added to MLPs up to a multiple of `width_multiple`."""
    layers = []
    for layer, attention, mlp in zip(view.layers, view.of_kind("attention"), view.of_kind("mlp"), strict=True):
        weights: Weights = {}
        heads = kv_heads = channels = 0
        if attention is not None:
            kv_heads, heads = attention.groups, attention.groups * attention.heads_per_group
            weights["attn_norm.weight"] = _whole(layer, _norm_before(layer, "attention"))
            weights |= _split(attention, "o")
            for name in ("q_norm", "k_norm"):
                if hasattr(attention.module, name):
                    weights[f"{name}.weight"] = _whole(attention.module, name)
        if mlp is not None:
            padding = -mlp.groups % width_multiple
            channels = mlp.groups + padding
            weights["ffn_norm.weight"] = _whole(layer, _norm_before(layer, "mlp"))
            weights |= _widened(_split(mlp, "down"), padding)
        layers.append(Layer(heads, kv_heads, channels, weights))
    return layers


def _norm_before(layer: nn.Module, kind: str) -> str:
    before, _ = norms_of(layer, kind)
    assert before is not None
    return before


def _split(block: LinearBlock, output: str) -> Weights:
    """Return a block's weights and biases by projection; the output projection gets the name `output`."""
    found: Weights = {}
    for entry in block.inputs:
        for part in entry.parts:
            rows = slice(part.offset, part.offset + part.rows * block.groups)
            found |= _linear(part.name, entry.linear, rows)
    return found | _linear(output, block.output.linear, slice(None))


def _linear(name: str, linear: nn.Linear, rows: slice) -> Weights:
    found = {f"{name}.weight": _given(linear.weight[rows])}
    if linear.bias is not None:
        found[f"{name}.bias"] = _given(linear.bias[rows])
    return found


def _widened(weights: Weights, padding: int) -> Weights:
    """Return an MLP's weights with `padding` zero channels appended."""
    return {
        name: weight
        if not padding or name == "down.bias"
        else _padded(weight, -1 if name == "down.weight" else 0, padding)
        for name, weight in weights.items()
    }


def _padded(weight: Weight, dim: int, padding: int) -> Weight:
    shape, values = weight
    longer = list(shape)
    longer[dim] += padding
    # F.pad takes two numbers per dimension, starting with the last dimension.
    spans = [0, padding] if dim == -1 else [0, 0] * (len(shape) - 1) + [0, padding]
    return tuple(longer), lambda: F.pad(values(), spans)


def _whole(module: nn.Module, norm: str) -> Weight:
    return _given(module.get_submodule(norm).get_parameter("weight"))


def _given(values: Tensor) -> Weight:
    return tuple(values.shape), lambda: values


def _zeros(*shape: int) -> Weight:
    return shape, lambda: torch.zeros(shape)


def _ones(width: int) -> Weight:
    return (width,), lambda: torch.ones(width)
