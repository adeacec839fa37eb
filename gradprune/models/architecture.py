"""What is prunable in each supported architecture, as data.

A decoder layer has two blocks. Each block reads the residual stream through input projections, whose
*rows* belong to groups, and writes to it through one output projection, whose *columns* do. Supporting
another architecture of this shape means adding one `Architecture` below.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class InputProjection:
    """A linear layer whose rows are split into consecutive parts, e.g. Phi-3's `qkv_proj` into q, k and v.

    path: attribute of the block's module.
    parts: what the rows hold, top to bottom: of "q", "k", "v" in attention, "gate", "up" in an MLP.
    """

    path: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """Where the prunable blocks of one `config.model_type` are.

    heads_divide_hidden: the configuration class refuses head counts that do not divide the hidden size.
    per_layer_heads: the configuration class accepts `num_attention_heads` in `per_layer_config`; those that check
        the global value when saving do not.
    """

    model_type: str
    attention_inputs: tuple[InputProjection, ...]
    mlp_inputs: tuple[InputProjection, ...]
    attention_output: str = "o_proj"
    mlp_output: str = "down_proj"
    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    heads_divide_hidden: bool = False
    per_layer_heads: bool = True


_SEPARATE_QKV = tuple(InputProjection(f"{part}_proj", (part,)) for part in ("q", "k", "v"))
_SEPARATE_GATE_UP = tuple(InputProjection(f"{part}_proj", (part,)) for part in ("gate", "up"))

ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("llama", _SEPARATE_QKV, _SEPARATE_GATE_UP, heads_divide_hidden=True, per_layer_heads=False),
        Architecture("mistral", _SEPARATE_QKV, _SEPARATE_GATE_UP),
        Architecture("qwen2", _SEPARATE_QKV, _SEPARATE_GATE_UP),
        Architecture("qwen3", _SEPARATE_QKV, _SEPARATE_GATE_UP),
        Architecture(
            "phi3",
            (InputProjection("qkv_proj", ("q", "k", "v")),),
            (InputProjection("gate_up_proj", ("gate", "up")),),
            per_layer_heads=False,
        ),
    )
}
