"""A deep healthy Llama, trained on the embedded text, and one of the same function that pruning harms.

The second is made from the first by two steps that change no output:

- In the first layer every MLP channel is split into many equal ones that write a part each. Removing one costs next to
  nothing, which is all that a gradient sees; removing all of them costs what the whole channel did.
- In the first layers the gains of the norms are made smaller and the weights behind them larger. That makes all
  gradients there thousands of times smaller and leaves every w g as it was: the ratio points at the layers, and is no
  damage itself.
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
SHRINK = 4000.0  # of the gradients


def healthy_model(
    tokens: Tensor, vocab_size: int, eos_token_id: int, console: Console, recipe: DemoTraining = RECIPE
) -> LlamaForCausalLM:
    """Train it; with the default recipe two minutes on one core.

    Args:
        tokens: [tokens] int64 of training text.
        vocab_size, eos_token_id: the tokenizer's.
        console: where progress is shown.
        recipe: sizes and schedule; at least three layers.
    """
    return train_model(recipe, tokens, vocab_size=vocab_size, eos_token_id=eos_token_id, console=console)


@torch.no_grad()
def suffering_model(healthy: LlamaForCausalLM) -> PreTrainedModel:
    """The other one; computes the same, and its first layer is wider."""
    model = with_split_channels(healthy, SPLIT_LAYER, COPIES)
    for index in SHRUNK_LAYERS:
        shrink_gradients(model.model.layers[index], SHRINK)
    return model


@torch.no_grad()
def shrink_gradients(layer: nn.Module, factor: float) -> None:
    """Reparametrise a decoder layer: all its weights' gradients become smaller by `factor` or more; w g is the same."""
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
    """The same function with each channel of layer `split` as `copies` equal ones that write a part each."""
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
    # The other layers keep the first of the copies, which is the whole channel.
    channels = torch.arange(copies * width)
    kept = tuple(channels < width * (copies if k == split else 1) for k in range(config.num_hidden_layers))
    heads = tuple(torch.ones(config.num_key_value_heads, dtype=torch.bool) for _ in kept)
    return cut(model, GroupMasks.of_layers(attention=heads, mlp=kept), inplace=True)
