"""A deep, healthy Llama trained on the embedded text, and a "suffering" one of the same function that pruning harms.

The second is made from the first by two steps that do not change its output:

- In the first layer every MLP channel is split into many equal ones, each of which writes a part of its output.
  Removing one of them costs next to nothing, and a gradient sees no more than that; removing all of them costs as much
  as removing the whole channel.
- In the first layers the gains of the norms are made smaller and the weights that follow them larger. This makes the
  gradients of all weights there thousands of times smaller, and leaves every product w g as it was: the gradient ratio
  points at these layers, although the step by itself does no damage.
"""

import copy

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from gradprune.demo.training import DemoTraining, train_model
from gradprune.models.masks import GroupMasks
from gradprune.surgery.cut import cut

RECIPE = DemoTraining(
    steps=240, hidden_size=64, intermediate_size=128, layers=24, heads=4, kv_heads=2, matrix_learning_rate=0.03
)
SPLIT_LAYER = 0
COPIES = 32
SHRUNK_LAYERS = (0, 1, 2)
SHRINK = 4000.0  # the gradients become smaller by this factor, or more


def healthy_model(
    tokens: Tensor, vocab_size: int, eos_token_id: int, console: Console, recipe: DemoTraining = RECIPE
) -> LlamaForCausalLM:
    """Train the healthy model; with the default recipe this takes two minutes on one core.

    Args:
        tokens: the training text, [tokens] int64.
        vocab_size, eos_token_id: vocabulary size and end-of-text token of the tokenizer.
        console: where progress is shown.
        recipe: sizes and schedule; at least three layers.
    """
    return train_model(recipe, tokens, vocab_size=vocab_size, eos_token_id=eos_token_id, console=console)


@torch.no_grad()
def suffering_model(healthy: LlamaForCausalLM) -> PreTrainedModel:
    """Make the model that pruning harms: it computes the same as `healthy`, and its first layer is wider."""
    model = with_split_channels(healthy, SPLIT_LAYER, COPIES)
    for index in SHRUNK_LAYERS:
        shrink_gradients(model.model.layers[index], SHRINK)
    return model


@torch.no_grad()
def shrink_gradients(layer: nn.Module, factor: float) -> None:
    """Reparametrise a decoder layer: gradients of its linear weights shrink by `factor` or more; w g stays the same."""
    attention, mlp = layer.self_attn, layer.mlp
    layer.input_layernorm.weight /= factor**2
    attention.q_proj.weight *= factor**2
    attention.k_proj.weight *= factor**2
    attention.v_proj.weight *= factor
    attention.o_proj.weight *= factor
    layer.post_attention_layernorm.weight /= factor**2
    mlp.gate_proj.weight *= factor**2
    mlp.up_proj.weight *= factor
    mlp.down_proj.weight *= factor


@torch.no_grad()
def with_split_channels(narrow: LlamaForCausalLM, split: int, copies: int) -> PreTrainedModel:
    """Make a model of the same function with each MLP channel of layer `split` divided into `copies` equal ones."""
    config = copy.deepcopy(narrow.config)
    width = config.intermediate_size
    config.intermediate_size = copies * width
    model = LlamaForCausalLM(config).eval()
    state = narrow.state_dict()
    for name, weight in state.items():
        if ".mlp.down_proj" in name:
            state[name] = weight.repeat(1, copies) / (copies if f".layers.{split}." in name else 1)
        elif ".mlp." in name:
            state[name] = weight.repeat(copies, 1)
    model.load_state_dict(state)
    # Every other layer keeps only the first copy of each channel, which writes the channel's whole output.
    channels = torch.arange(copies * width)
    kept = tuple(channels < width * (copies if k == split else 1) for k in range(config.num_hidden_layers))
    heads = tuple(torch.ones(config.num_key_value_heads, dtype=torch.bool) for _ in kept)
    return cut(model, GroupMasks.of_layers(attention=heads, mlp=kept), inplace=True)
