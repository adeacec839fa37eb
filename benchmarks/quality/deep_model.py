"""Two deep Llamas of the same size, trained on the embedded text: a healthy one, and one that suffers.

The second has massive activations, as they are reported for early layers of large models (Sun et al. 2024,
arXiv:2402.17762): the MLP of an early layer writes nothing but a constant, hundreds of times larger than all else, into
one coordinate of the residual stream that no later layer reads. RMSNorm divides by it, and everything behind has learnt
to work at that scale. So a little more or less of it changes the loss hardly at all, which is all that a gradient
sees; without it every later layer gets its input magnified. The attention of that layer writes next to nothing. Its
gradients are thousands of times smaller than those of the others: of its attention rightly, of its MLP wrongly.

That layer keeps its initial weights; the rest of the model is trained around it.
"""

import torch
from rich.console import Console
from torch import Tensor
from transformers import LlamaForCausalLM

from gradprune.demo.training import DemoTraining, fit, random_model

RECIPE = DemoTraining(
    steps=240, hidden_size=64, intermediate_size=128, layers=24, heads=4, kv_heads=2, matrix_learning_rate=0.03
)
MASSIVE_LAYER = 1
MASSIVE = 300.0  # what it writes
_CONSTANT, _MASSIVE = 0, 1  # coordinates of the stream
_LEVEL = 3.0  # of the first, in every token's embedding
_ACTIVATION = 1e-2  # of the massive layer's channels


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
        if index == MASSIVE_LAYER:
            _plant_layer(layer, _LEVEL / size**0.5)
            layer.requires_grad_(False)
            total = MASSIVE
        elif total > 0.0:
            # From here on RMSNorm divides by a constant; this takes it back.
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight *= total / size**0.5
    decoder.norm.weight *= total / size**0.5
    decoder.norm.weight[_MASSIVE] = 0.0


def _plant_layer(layer: torch.nn.Module, rms: float) -> None:
    """Channels that all have the same small constant activation, and attention that reads next to nothing.

    rms: of the stream before the layer; times the normalised constant it gives the level again.
    """
    layer.input_layernorm.weight.fill_(1e-4)
    mlp = layer.mlp
    layer.post_attention_layernorm.weight.zero_()
    layer.post_attention_layernorm.weight[_CONSTANT] = rms / _LEVEL
    mlp.gate_proj.weight.zero_()
    mlp.up_proj.weight.zero_()
    mlp.down_proj.weight.zero_()
    channels = mlp.gate_proj.weight.shape[0]
    # silu(1) * up = activation
    mlp.gate_proj.weight[:, _CONSTANT] = 1.0
    mlp.up_proj.weight[:, _CONSTANT] = _ACTIVATION / torch.nn.functional.silu(torch.ones(())).item()
    mlp.down_proj.weight[_MASSIVE] = MASSIVE / (channels * _ACTIVATION)
