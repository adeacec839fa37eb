import pytest
import torch
from torch import nn
from transformers import CTRLConfig, CTRLLMHeadModel, PreTrainedModel

from gradprune.calibration.engine import ImportanceEngine
from gradprune.errors import GradPruneError, NonFiniteError, UnsupportedArchitectureError
from gradprune.models import describe
from gradprune.models.loss import sample_losses
from gradprune.vanishing.from_model import gradients_of_model
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_ids, tiny_model


def backward(model: PreTrainedModel, samples: int = 2) -> PreTrainedModel:
    sample_losses(model, tiny_ids(samples)).mean().backward()
    return model


def test_statistics_of_a_layer_cover_all_its_parameters() -> None:
    model = backward(tiny_model("qwen2"))
    found = gradients_of_model(model)
    assert [layer.layer for layer in found] == [0, 1, 2]
    for layer, statistics in zip(model.model.layers, found, strict=True):
        grads = {name: p.grad for name, p in layer.named_parameters()}
        absolute = torch.cat([g.flatten() for g in grads.values()]).abs()
        assert statistics.mean == pytest.approx(absolute.mean().item(), rel=1e-12)
        assert statistics.std == pytest.approx(absolute.std(correction=0).item(), rel=1e-9)
        assert statistics.norm == pytest.approx(absolute.norm().item(), rel=1e-12)
        assert (statistics.maximum, statistics.minimum) == (absolute.max().item(), absolute.min().item())
        expected = {name.removesuffix(".weight"): g.norm().item() for name, g in grads.items()}
        assert statistics.parameter_norms == pytest.approx(expected, rel=1e-12)
        assert {"self_attn.q_proj", "self_attn.q_proj.bias", "input_layernorm"} <= statistics.parameter_norms.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_one_sample_agrees_with_the_engine_on_the_prunable_weights(architecture: str) -> None:
    model, ids = tiny_model(architecture), tiny_ids(samples=1)
    with ImportanceEngine(model, "taylor", backend="reference") as engine:
        engine.step(ids)
    expected = engine.scores().gradients
    sample_losses(model, ids).sum().backward()
    # The engine sees only the projections' weights, so the norms' and biases' gradients are left out.
    for layer, statistics in zip(model.model.layers, expected, strict=True):
        for name, parameter in layer.named_parameters():
            if name.removesuffix(".weight") not in statistics.parameter_norms:
                parameter.grad = None
    for found, statistics in zip(gradients_of_model(model), expected, strict=True):
        for name in ("layer", "mean", "std", "norm", "maximum", "minimum", "parameter_norms"):
            assert getattr(found, name) == pytest.approx(getattr(statistics, name), rel=1e-6), name


def test_a_model_that_cannot_be_pruned_is_measured() -> None:
    model = CTRLLMHeadModel(CTRLConfig(n_embd=8, n_head=2, n_layer=3, dff=16, vocab_size=61, n_positions=16)).eval()
    with pytest.raises(UnsupportedArchitectureError):
        describe(model)
    found = gradients_of_model(backward(model))
    assert len(found) == 3
    norm = model.transformer.h[1].multi_head_attention.Wq.weight.grad.norm().item()
    assert found[1].parameter_norms["multi_head_attention.Wq"] == pytest.approx(norm, rel=1e-6)


def test_bf16_gradients_are_summed_in_fp32() -> None:
    model = backward(tiny_model(dtype=torch.bfloat16))
    absolute = torch.cat([p.grad.flatten() for p in model.model.layers[0].parameters()]).double().abs()
    assert gradients_of_model(model)[0].mean == pytest.approx(absolute.mean().item(), rel=1e-5)


def test_a_frozen_layer_counts_as_zero_and_a_frozen_parameter_is_left_out() -> None:
    model = tiny_model()
    model.model.layers[1].requires_grad_(False)
    model.model.layers[2].mlp.requires_grad_(False)
    live, frozen, partly = gradients_of_model(backward(model))
    assert not live.frozen
    assert not partly.frozen
    assert frozen.frozen
    assert (frozen.layer, frozen.mean, frozen.norm, frozen.parameter_norms) == (1, 0.0, 0.0, {})
    absolute = torch.cat([p.grad.flatten() for p in model.model.layers[2].parameters() if p.grad is not None]).abs()
    assert partly.mean == pytest.approx(absolute.mean().item(), rel=1e-12)
    assert not any(name.startswith("mlp") for name in partly.parameter_norms)


def test_a_zero_gradient_is_not_frozen() -> None:
    model = backward(tiny_model())
    for parameter in model.model.layers[0].parameters():
        parameter.grad.zero_()
    first = gradients_of_model(model)[0]
    assert first.mean == 0.0
    assert not first.frozen


def test_layers_without_parameters_are_left_out() -> None:
    model = backward(tiny_model())
    model.model.layers[1] = type(model.model.layers[1]).__new__(type(model.model.layers[1]))
    nn.Module.__init__(model.model.layers[1])
    assert [layer.layer for layer in gradients_of_model(model)] == [0, 2]


def test_parameters_without_elements_are_left_out() -> None:
    model = tiny_model()
    model.model.layers[0].register_parameter("empty", nn.Parameter(torch.empty(0)))
    model.model.layers[0].empty.grad = torch.empty(0)
    first = gradients_of_model(backward(model))[0]
    assert first.minimum < first.maximum
    assert "empty" not in first.parameter_norms


def test_no_gradient_anywhere_is_an_error() -> None:
    model = tiny_model()
    with pytest.raises(GradPruneError, match=r"none of the 3 decoder layers has a \.grad; call loss\.backward\(\)"):
        gradients_of_model(model)
    model.model.layers.requires_grad_(False)
    with pytest.raises(GradPruneError, match="none of the 3 decoder layers"):
        gradients_of_model(backward(model))
    with pytest.raises(UnsupportedArchitectureError):
        gradients_of_model(nn.Linear(2, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_gradient_names_the_parameter(value: float) -> None:
    model = backward(tiny_model())
    model.model.layers[1].mlp.up_proj.weight.grad[0, 1] = value
    with pytest.raises(NonFiniteError, match=r"1 of \d+ elements of layer 1's mlp\.up_proj\.weight are NaN"):
        gradients_of_model(model)


def test_an_overflowing_sum_of_squares_names_the_parameter() -> None:
    model = backward(tiny_model(dtype=torch.float32))
    model.model.layers[2].mlp.down_proj.weight.grad[0, 0] = 1e30
    with pytest.raises(NonFiniteError, match=r"layer 2's mlp\.down_proj\.weight overflows"):
        gradients_of_model(model)


def test_the_gradients_are_left_as_they_were() -> None:
    model = backward(tiny_model())
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    first, second = gradients_of_model(model), gradients_of_model(model)
    assert first == second
    assert all(torch.equal(before[name], parameter.grad) for name, parameter in model.named_parameters())
