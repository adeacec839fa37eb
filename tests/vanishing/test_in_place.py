import copy
import statistics

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gradprune import adaptive_gradient_scaling, normalize_gradients_per_layer, weight_gradients_by_depth
from gradprune.errors import ConfigError, GradPruneError, NonFiniteError
from helpers.tiny_models import tiny_ids, tiny_model


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=3, n_head=2)).eval()


def backward(model):
    ids = tiny_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    return model


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def naive_scales(model, name: str) -> list[float]:
    """Return the layers' scales, computed from the formulas parameter by parameter."""
    norms = [
        [p.grad.double().norm().item() for p in layer.parameters() if p.grad is not None] for layer in layers_of(model)
    ]
    median = statistics.median_high([norm for layer in norms for norm in layer])
    scales = []
    for index, layer in enumerate(norms):
        mean = sum(layer) / len(layer)
        scales.append(
            {
                "adaptive": min(max(median / mean, 0.1), 10.0),
                "normalize": 1.0 / mean,
                "sqrt": ((len(norms) - index) / len(norms)) ** 0.5 + 0.5,
            }[name]
        )
    return scales


FUNCTIONS = {
    "adaptive": adaptive_gradient_scaling,
    "normalize": normalize_gradients_per_layer,
    "sqrt": weight_gradients_by_depth,
}


@pytest.mark.parametrize("backend", ["reference", "cpp", "auto"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("make", [tiny_model, lambda: tiny_model("phi3", dtype=torch.float32), gpt2])
def test_scales_equal_those_of_naive_per_parameter_code(make, name: str, backend: str) -> None:
    model = backward(make())
    before = {key: p.grad.clone() for key, p in model.named_parameters()}
    expected = naive_scales(copy_with_gradients(model), name)
    done = FUNCTIONS[name](model, backend=backend)
    assert done.scales == pytest.approx(expected, rel=1e-5)
    assert len(done.norms) == 3
    inside = {id(p) for layer in layers_of(model) for p in layer.parameters()}
    for layer, scale in zip(layers_of(model), done.scales, strict=True):
        for key, p in layer.named_parameters():
            full = next(name for name, q in model.named_parameters() if q is p)
            torch.testing.assert_close(p.grad, before[full] * scale, rtol=1e-6, atol=0.0, msg=key)
    for key, p in model.named_parameters():
        if id(p) not in inside:
            assert torch.equal(p.grad, before[key]), key


def copy_with_gradients(model):
    twin = copy.deepcopy(model)
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    return twin


def test_no_gradient_at_all_says_to_call_backward() -> None:
    with pytest.raises(GradPruneError, match=r"call loss.backward\(\) first"):
        adaptive_gradient_scaling(tiny_model())


def test_a_nan_gradient_is_named_and_nothing_is_scaled() -> None:
    model = backward(tiny_model())
    model.model.layers[1].mlp.up_proj.weight.grad[0, 0] = float("nan")
    before = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    with pytest.raises(NonFiniteError, match=r"layer 1's mlp.up_proj"):
        normalize_gradients_per_layer(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.grad, before)


def test_a_frozen_layer_is_left_alone() -> None:
    model = tiny_model()
    model.model.layers[1].requires_grad_(False)
    done = adaptive_gradient_scaling(backward(model))
    assert done.scales[1] == 1.0
    assert done.norms[1] == {}
    assert done.scales[0] != 1.0


def test_an_unknown_strategy_is_refused_and_changes_nothing() -> None:
    model = backward(tiny_model())
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ConfigError, match="strategy: 'cubic' is unknown; choose one of linear, sqrt, log"):
        weight_gradients_by_depth(model, "cubic")
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in model.named_parameters())
