"""What is prunable in each supported architecture, as data.

A decoder layer is a sequence of blocks. Each block reads the residual stream through input projections, whose
*rows* belong to groups, and adds to it through one output projection, whose *columns* do. To support another
architecture of this shape, add one `Architecture` below.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class InputProjection:
    """A linear layer that stacks the rows of one or more projections, e.g. Phi-3's `qkv_proj`: q, k and v.

    path: attribute of the block's module.
    parts: what the rows hold, top to bottom: "q", "k", "v" in attention, "gate", "up" in an MLP.
    """

    path: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class BlockLayout:
    """Where one block of a decoder layer is.

    kind: its kind's name. module: attribute of the decoder layer. inputs, output: projections in that module.
    """

    kind: str
    module: str
    inputs: tuple[InputProjection, ...]
    output: str


@dataclass(frozen=True)
class Architecture:
    """The prunable blocks of one `config.model_type`.

    blocks: those of a decoder layer, in the order in which they add to the residual stream.
    layers: path of the decoder layers in the model.
    heads_divide_hidden: the configuration class refuses head counts that do not divide the hidden size.
    per_layer_heads: the stock configuration class accepts `num_attention_heads` in `per_layer_config`; those that check
        the global value do so only where the configuration allows to read it.
    """

    model_type: str
    blocks: tuple[BlockLayout, ...]
    layers: str = "model.layers"
    heads_divide_hidden: bool = False
    per_layer_heads: bool = True


def _attention(*inputs: InputProjection) -> BlockLayout:
    return BlockLayout("attention", "self_attn", inputs, "o_proj")


def _mlp(*inputs: InputProjection) -> BlockLayout:
    return BlockLayout("mlp", "mlp", inputs, "down_proj")


_SEPARATE = (
    _attention(*(InputProjection(f"{part}_proj", (part,)) for part in ("q", "k", "v"))),
    _mlp(*(InputProjection(f"{part}_proj", (part,)) for part in ("gate", "up"))),
)
_FUSED = (
    _attention(InputProjection("qkv_proj", ("q", "k", "v"))),
    _mlp(InputProjection("gate_up_proj", ("gate", "up"))),
)

ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("llama", _SEPARATE, heads_divide_hidden=True, per_layer_heads=False),
        Architecture("mistral", _SEPARATE),
        Architecture("qwen2", _SEPARATE),
        Architecture("qwen3", _SEPARATE),
        Architecture("phi3", _FUSED, per_layer_heads=False),
    )
}
