import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models.decoder_layers import find_decoder_layers
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_model


class Layer(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.proj = nn.Linear(2, 2)
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(experts))


def model_of(**children: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_layers_of_every_supported_architecture_are_found(architecture: str) -> None:
    model = tiny_model(architecture)
    assert find_decoder_layers(model) is model.model.layers
    assert find_decoder_layers(model.model) is model.model.layers


def test_layers_of_architectures_without_a_description_are_found() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=3, vocab_size=11, n_positions=16))
    assert find_decoder_layers(gpt2) is gpt2.transformer.h
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 11}
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=8, **sizes))
    assert find_decoder_layers(neox) is neox.gpt_neox.layers
    opt = OPTForCausalLM(OPTConfig(ffn_dim=8, word_embed_proj_dim=8, pad_token_id=1, **sizes))
    assert find_decoder_layers(opt) is opt.model.decoder.layers


def test_a_longer_list_of_experts_within_a_layer_does_not_win() -> None:
    layers = nn.ModuleList(Layer(experts=8) for _ in range(2))
    assert find_decoder_layers(model_of(embed=nn.Embedding(3, 2), layers=layers)) is layers


def test_the_longest_list_wins_and_of_equal_lengths_the_one_with_more_parameters() -> None:
    short, long = (nn.ModuleList(Layer() for _ in range(length)) for length in (3, 5))
    short.append(Layer(experts=99))
    assert find_decoder_layers(model_of(vision=short, text=long)) is long
    wide = nn.ModuleList(Layer(experts=1) for _ in range(5))
    assert find_decoder_layers(model_of(encoder=long, decoder=wide)) is wide
    assert find_decoder_layers(model_of(decoder=wide, encoder=long)) is wide


def test_lists_without_parameters_or_of_mixed_classes_do_not_count() -> None:
    layers = nn.ModuleList([Layer()])
    mixed = nn.ModuleList([nn.Linear(2, 2), nn.Embedding(2, 2)])
    assert find_decoder_layers(model_of(drop=nn.ModuleList([nn.Dropout()] * 4), mixed=mixed, layers=layers)) is layers


def test_a_pruned_layer_without_parameters_still_counts() -> None:
    layers = nn.ModuleList([Layer(), Layer()])
    del layers[0].proj
    assert find_decoder_layers(model_of(layers=layers)) is layers


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), model_of(mixed=nn.ModuleList([nn.Linear(2, 2), Layer(experts=3)])), nn.ModuleList()]
)
def test_no_layers_is_an_error_that_says_what_is_expected(model: nn.Module) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=rf"in a {type(model).__name__}; expected an nn.ModuleList"):
        find_decoder_layers(model)


def test_a_wrapped_model_is_searched_too() -> None:
    model = tiny_model(dtype=torch.float32)
    assert find_decoder_layers(model_of(module=model)) is model.model.layers
