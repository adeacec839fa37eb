"""Two deep Llamas of the same size, trained on the embedded text: a healthy one, and one that suffers.

The second has massive activations, as they are reported for early layers of large models (Sun et al. 2024,
arXiv:2402.17762): the MLPs of four early layers write nothing but a constant, hundreds of times larger than all else,
into one coordinate of the residual stream that no later layer reads. RMSNorm divides by it, and everything behind has
learnt to work at that scale. What one channel of the hundreds writes hardly matters, which is all that a gradient sees;
without all of them every later layer gets its input magnified. The attention of these layers writes next to nothing.
Their gradients are thousands of times smaller than those of the others: of their attention rightly, of their MLPs
wrongly.

These four layers keep their initial weights; the rest of the model is trained around them.
"""

import torch
from rich.console import Console
from torch import Tensor
from transformers import LlamaForCausalLM

from gradprune.demo.training import DemoTraining, fit, random_model

RECIPE = DemoTraining(
    steps=240, hidden_size=64, intermediate_size=128, layers=24, heads=4, kv_heads=2, matrix_learning_rate=0.03
)
MASSIVE_LAYERS = (1, 2, 3, 4)
MASSIVE = 300.0  # what they write together
_CONSTANT, _MASSIVE = 0, 1  # coordinates of the stream
_LEVEL = 3.0  # of the first, in every token's embedding
_ACTIVATION = 1e-2  # of the massive layers' channels


def deep_model(
    tokens: Tensor, vocab_size: int, eos_token_id: int, console: Console, *, massive: bool
) -> LlamaForCausalLM:
    """Train one of the two.

    Args:
        tokens: [tokens] int64 of training text.
        vocab_size, eos_token_id: the tokenizer's.
        console: where progress is shown.
        massive: the one that suffers.
    """
    model = random_model(RECIPE, vocab_size, eos_token_id)
    if massive:
        _plant(model)
    fit(model, RECIPE, tokens, console)
    model.requires_grad_(True)
    return model


@torch.no_grad()
def _plant(model: LlamaForCausalLM) -> None:
    decoder = model.model
    size = model.config.hidden_size
    decoder.embed_tokens.weight[:, _CONSTANT] = _LEVEL
    decoder.embed_tokens.weight[:, _MASSIVE] = 0.0
    total = 0.0
    for index, layer in enumerate(decoder.layers):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[_MASSIVE] = 0.0
        if index in MASSIVE_LAYERS:
            # The first reads the constant that the embedding brings, the others what those before them wrote: its
            # normalised value is the same however much that is.
            if total == 0.0:
                _plant_layer(layer, _CONSTANT, size**-0.5)
            else:
                _plant_layer(layer, _MASSIVE, size**-0.5)
            layer.requires_grad_(False)
            total += MASSIVE / len(MASSIVE_LAYERS)
        elif total > 0.0:
            # From here on RMSNorm divides by a constant; this takes it back.
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight *= total / size**0.5
    decoder.norm.weight *= total / size**0.5
    decoder.norm.weight[_MASSIVE] = 0.0


def _plant_layer(layer: torch.nn.Module, coordinate: int, gain: float) -> None:
    """Channels that all have the same small constant activation, and attention that reads next to nothing.

    coordinate: of the stream, where the layer finds a constant. gain: of the norm, that makes it about 1.
    """
    layer.input_layernorm.weight.fill_(1e-4)
    layer.post_attention_layernorm.weight.zero_()
    layer.post_attention_layernorm.weight[coordinate] = gain
    mlp = layer.mlp
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        linear.weight.zero_()
    # silu(1) * up = activation
    mlp.gate_proj.weight[:, coordinate] = 1.0
    mlp.up_proj.weight[:, coordinate] = _ACTIVATION / torch.nn.functional.silu(torch.ones(())).item()
    channels = mlp.gate_proj.weight.shape[0]
    mlp.down_proj.weight[_MASSIVE] = MASSIVE / len(MASSIVE_LAYERS) / (channels * _ACTIVATION)
