"""The content of a GGUF file: the architecture of llama.cpp to use, the hyperparameters and the tensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gradprune.errors import ExportError
from gradprune.export.gguf_layers import Layer, Weight, Weights, read_layers
from gradprune.models import describe
from gradprune.models.modeling_gradprune import place_of

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file.

    name: llama.cpp's name. shape: rows first, as in PyTorch. values: computes the tensor when it is written.
    """

    name: str
    shape: tuple[int, ...]
    values: Callable[[], Tensor]


@dataclass(frozen=True)
class Layout:
    """How one of llama.cpp's architectures expects the weights of a decoder layer.

    per_layer: each layer has its own widths; otherwise all layers have one set of widths.
    interleaved: the rotary embedding rotates pairs of neighbouring rows of q and k, not rows half a head apart.
    fused_qkv, fused_gate_up: these projections are stored as one matrix.
    square: the number of query heads times head_dim must equal the hidden size.
    """

    per_layer: bool = False
    interleaved: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    square: bool = False


LAYOUTS = {
    "llama": Layout(interleaved=True),
    "qwen2": Layout(square=True),
    "qwen3": Layout(),
    "phi3": Layout(fused_qkv=True, fused_gate_up=True, square=True),
    "deci": Layout(per_layer=True, interleaved=True),
    "openelm": Layout(per_layer=True, fused_qkv=True),
}
# By `config.model_type`: the architecture for layers of equal widths, and the one for layers that differ.
ARCHITECTURES = {
    "llama": ("llama", "deci"),
    "mistral": ("llama", "deci"),
    "qwen2": ("qwen2", "deci"),
    "qwen3": ("qwen3", "openelm"),
    "phi3": ("phi3", "deci"),
}


@dataclass(frozen=True)
class GGUFModel:
    """The content of a GGUF file without the tokenizer; the tensors are in the file's order."""

    architecture: str
    config: PreTrainedConfig
    head_dim: int
    layers: list[Layer]
    tensors: list[GGUFTensor]

    def add_keys(self, writer: "GGUFWriter") -> None:
        """Add the hyperparameters; widths are arrays, by layer, if the architecture's layers may differ."""
        from gguf import RopeScalingType

        config, rope = self.config, _rope(self.config)
        writer.add_context_length(_context(config))
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(len(self.layers))
        writer.add_feed_forward_length(self._each([layer.channels for layer in self.layers]))
        writer.add_head_count(self._each([layer.heads for layer in self.layers]))
        writer.add_head_count_kv(self._each([layer.kv_heads for layer in self.layers]))
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_vocab_size(config.vocab_size)
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])

    def _each(self, values: list[int]) -> int | list[int]:
        return values if LAYOUTS[self.architecture].per_layer else values[0]


def lay_out(model: PreTrainedModel, *, width_multiple: int = 1) -> GGUFModel:
    """Choose llama.cpp's architecture for a model and lay out its tensors.

    Args:
        model: a supported causal LM, pruned or not.
        width_multiple: zero channels are added to each MLP up to a multiple of this number.

    Raises:
        ExportError: llama.cpp has no architecture that computes the same as the model.
    """
    view, config = describe(model), model.config
    check_config(config, alike=True)
    # A removed attention block still records its head_dim.
    attention: Any = view.layers[0].get_submodule(place_of(view.layers[0], "attention"))
    head_dim = int(attention.head_dim)
    layers = read_layers(view, width_multiple)
    architecture = _architecture(config, layers, head_dim)
    layout = LAYOUTS[architecture]
    if layout.per_layer:
        # deci reads the head size from layer 0, and openelm has no layers without attention.
        required = range(len(layers)) if architecture == "openelm" else range(1)
        layers = [
            layer.with_attention(config.hidden_size, head_dim, qk_norm=config.model_type == "qwen3")
            if index in required
            else layer
            for index, layer in enumerate(layers)
        ]
        layers = [layer.with_mlp(config.hidden_size) for layer in layers]
    tensors = list(_outer_tensors(model, head_dim))
    for index, layer in enumerate(layers):
        tensors += _layer_tensors(index, layer, layout, head_dim)
    return GGUFModel(architecture, config, head_dim, layers, tensors)


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    found: dict[str, Any] = config.rope_parameters
    return found


def _context(config: PreTrainedConfig) -> int:
    """Tokens of context, at most the sliding window: llama.cpp's attention has none here, and differs beyond it."""
    window = getattr(config, "sliding_window", None)
    longest = int(config.max_position_embeddings)
    return longest if window is None else min(longest, int(window))


def check_config(config: PreTrainedConfig, *, alike: bool) -> None:
    """Refuse a model that none of llama.cpp's architectures computes.

    Args:
        config: the model's configuration.
        alike: whether all layers have the same widths and no block is removed.

    Raises:
        ExportError: the model cannot be represented; the message gives the reason.
    """
    if config.model_type not in ARCHITECTURES:
        raise ExportError(
            f"format: gradprune writes no gguf file of the architecture '{config.model_type}', only of "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ExportError(
            f"format: gguf files of gradprune hold rotary embeddings of type default, linear and llama3, "
            f"not '{rope['rope_type']}' (rope_parameters in config.json)"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError(
            "format: llama.cpp rotates whole heads here, but partial_rotary_factor in config.json is not 1"
        )
    if config.hidden_act != "silu":
        raise ExportError(f"format: llama.cpp computes silu in these models' MLPs, not '{config.hidden_act}'")
    if config.model_type == "qwen3" and config.attention_bias:
        raise ExportError("format: llama.cpp has no biases in Qwen3's attention; attention_bias in config.json is true")
    if config.model_type == "qwen3" and not alike:
        if not config.tie_word_embeddings:
            raise ExportError(
                "format: llama.cpp loads a Qwen3 whose layers differ only with tied embeddings, and this one's are "
                "not (tie_word_embeddings); prune it with --uniform"
            )
        if rope["rope_type"] == "llama3":
            raise ExportError("format: llama.cpp loads no Qwen3 with llama3's rotary embedding whose layers differ")


def _architecture(config: PreTrainedConfig, layers: list[Layer], head_dim: int) -> str:
    """Return the architecture for layers of equal widths if it fits, else the one for layers that differ."""
    plain, per_layer = ARCHITECTURES[config.model_type]
    shapes = {(layer.heads, layer.kv_heads, layer.channels) for layer in layers}
    heads, _, channels = next(iter(shapes))
    alike = len(shapes) == 1 and heads > 0 and channels > 0
    if alike and not (LAYOUTS[plain].square and heads * head_dim != config.hidden_size):
        return plain
    check_config(config, alike=False)
    return per_layer


def _outer_tensors(model: PreTrainedModel, head_dim: int) -> Iterator[GGUFTensor]:
    """Yield the embedding, the last norm, the head unless it is tied, and any factors of llama3's rotary embedding."""
    body: Any = model.get_decoder()
    yield _tensor("token_embd.weight", body.embed_tokens.weight)
    yield _tensor("output_norm.weight", body.norm.weight)
    if not model.config.tie_word_embeddings:
        yield _tensor("output.weight", model.get_output_embeddings().weight)
    rope = _rope(model.config)
    if rope["rope_type"] == "llama3":
        pairs = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        yield _tensor("rope_freqs.weight", rope["rope_theta"] ** -pairs / body.rotary_emb.inv_freq.double().cpu())


def _tensor(name: str, values: Tensor) -> GGUFTensor:
    return GGUFTensor(name, tuple(values.shape), lambda: values)


def _layer_tensors(index: int, layer: Layer, layout: Layout, head_dim: int) -> Iterator[GGUFTensor]:
    """Yield the layer's tensors in the given layout, under llama.cpp's names."""
    weights = layer.weights
    if layout.interleaved:
        weights = {n: _interleaved(v, head_dim) if n.startswith(("q.", "k.")) else v for n, v in weights.items()}
    if layout.fused_qkv:
        weights = _fused(weights, ("q", "k", "v"), "qkv")
    if layout.fused_gate_up:
        weights = _fused(weights, ("gate", "up"), "up")
    for name, (shape, values) in weights.items():
        projection, _, kind = name.partition(".")
        yield GGUFTensor(f"blk.{index}.{_NAMES[projection]}.{kind}", shape, values)


_NAMES = {
    "attn_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "qkv": "attn_qkv",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def _fused(weights: Weights, names: tuple[str, ...], fused: str) -> Weights:
    """Return `weights` with the projections `names` stacked, weights and biases alike, into one called `fused`."""
    found = {key: value for key, value in weights.items() if key.partition(".")[0] not in names}
    for kind in ("weight", "bias"):
        parts = [weights[key] for name in names if (key := f"{name}.{kind}") in weights]
        if parts:
            found[f"{fused}.{kind}"] = _stacked(parts)
    return found


def _stacked(parts: list[Weight]) -> Weight:
    rows = sum(shape[0] for shape, _ in parts)
    return (rows, *parts[0][0][1:]), lambda: torch.cat([values() for _, values in parts])


def _interleaved(weight: Weight, head_dim: int) -> Weight:
    """Reorder the rows of each head to 0, head_dim/2, 1, head_dim/2 + 1, ..."""
    shape, values = weight
    return shape, lambda: values().reshape(-1, 2, head_dim // 2, *shape[1:]).transpose(1, 2).reshape(shape)
