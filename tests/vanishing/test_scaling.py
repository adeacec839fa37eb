import math

import pytest
import torch

from gradprune import (
    ImportanceEngine,
    adaptive_gradient_scaling,
    normalize_gradients_per_layer,
    weight_gradients_by_depth,
)
from gradprune.errors import ConfigError
from gradprune.vanishing.diagnosis import diagnose_gradients, verdict_of
from gradprune.vanishing.scaling import layer_scales, resolve_fix, scales_of
from gradprune.vanishing.statistics import LayerGradients, pool_steps
from helpers.engine_runs import run_engine
from helpers.tiny_models import tiny_ids, tiny_model

# The layers' means are 2, 20, 0.05 and 20; the upper median of the eight norms is 10.
NORMS = [[1.0, 3.0], [10.0, 30.0, 20.0], [0.05, 0.05], [20.0]]


@pytest.mark.parametrize(
    ("fix", "expected"),
    [
        ("none", [1.0, 1.0, 1.0, 1.0]),
        ("adaptive", [5.0, 0.5, 10.0, 0.5]),
        ("normalize", [0.5, 0.05, 20.0, 0.05]),
        ("depth:linear", [1.5, 1.25, 1.0, 0.75]),
        ("depth:sqrt", [1.5, math.sqrt(0.75) + 0.5, math.sqrt(0.5) + 0.5, 1.0]),
        ("depth:log", [math.log(k) / math.log(5) + 0.5 for k in (5, 4, 3, 2)]),
    ],
)
def test_scales_equal_the_formulas(fix: str, expected: list[float]) -> None:
    assert layer_scales(fix, NORMS) == pytest.approx(expected, rel=1e-14)


def test_a_chain_computes_each_part_on_the_result_of_the_one_before() -> None:
    depth = layer_scales("depth:linear", NORMS)
    scaled = [[norm * scale for norm in layer] for layer, scale in zip(NORMS, depth, strict=True)]
    expected = [a * b for a, b in zip(depth, layer_scales("adaptive", scaled), strict=True)]
    assert layer_scales("depth:linear+adaptive", NORMS) == pytest.approx(expected, rel=1e-14)
    assert layer_scales("depth:linear+adaptive", NORMS) != pytest.approx(layer_scales("adaptive+depth:linear", NORMS))


@pytest.mark.parametrize("fix", ["adaptive", "normalize", "depth:sqrt", "adaptive+normalize"])
def test_a_layer_without_gradient_keeps_scale_1(fix: str) -> None:
    scales = layer_scales(fix, [[1.0], [0.0, 0.0], [], [4.0]])
    assert scales[1] == scales[2] == 1.0


@pytest.mark.parametrize("fix", ["adaptive+", "depth", "depth:cubic", "adaptive+auto", ""])
def test_an_unknown_fix_is_named(fix: str) -> None:
    with pytest.raises(ConfigError, match=r"gradient_fix: '.*' in '.*' is unknown; choose none, auto, one of adaptive"):
        layer_scales(fix, NORMS)


@pytest.mark.parametrize(
    ("ratio", "verdict", "fix"),
    [
        (99.9, "normal", "none"),
        (100.0, "mild", "adaptive"),
        (1000.0, "mild", "adaptive"),
        (1000.1, "severe", "adaptive+depth:sqrt"),
        (math.inf, "severe", "adaptive+depth:sqrt"),
    ],
)
def test_auto_follows_the_verdict(ratio: float, verdict: str, fix: str) -> None:
    means = [ratio, 1.0] if math.isfinite(ratio) else [1.0, 0.0]
    layers = [LayerGradients(layer, mean, 0.0, mean, mean, mean, {"w": mean}) for layer, mean in enumerate(means)]
    assert verdict_of(ratio) == diagnose_gradients(layers).verdict == verdict
    assert resolve_fix("auto", layers) == fix
    if not math.isfinite(ratio):
        assert "Without any gradient: layer 1" in diagnose_gradients(layers).verdict_text()


FIXES = ["adaptive", "normalize", "depth:sqrt", "adaptive+depth:sqrt", "depth:log+normalize"]


def in_place(model, fix: str) -> None:
    for part in fix.split("+"):
        if part == "adaptive":
            adaptive_gradient_scaling(model)
        elif part == "normalize":
            normalize_gradients_per_layer(model)
        else:
            weight_gradients_by_depth(model, part.removeprefix("depth:"))


@pytest.mark.parametrize("fix", FIXES)
def test_scaled_vectors_equal_scaled_gradients(fix: str) -> None:
    """With one batch, the engine's scaled vectors are |w g| and w^2 g^2 of the gradients scaled in place."""
    model, ids = tiny_model("llama", layers=4), tiny_ids()
    with ImportanceEngine(model, "taylor_2nd", "batch", "reference", gradient_fix=fix) as engine:
        engine.step(ids)
    scores = engine.scores()
    # The engine sees only the prunable weights, so the other parameters get no gradient here either.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("proj.weight"))
    model(input_ids=ids, labels=ids).loss.backward()
    in_place(model, fix)
    for layer, module in enumerate(model.model.layers):
        total = torch.zeros(10, dtype=torch.float64)
        for name, dim in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0)):
            weight = getattr(module.mlp, name).weight
            product = (weight * weight.grad).detach()
            total += (product.abs() + 0.5 * product**2).sum(dim)
        torch.testing.assert_close(scores.mlp[layer].double(), total, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("method", ["taylor", "fisher", "taylor_2nd", "group_fisher"])
@pytest.mark.parametrize("fix", FIXES)
def test_sample_scales_are_applied_once_to_the_finished_vectors(method: str, fix: str) -> None:
    model, ids = tiny_model(layers=4), tiny_ids(samples=5)
    plain = run_engine(model, ids, method)
    fixed = run_engine(model, ids, method, gradient_fix=fix)
    norms = [list(layer.parameter_norms.values()) for layer in plain.gradients]
    scales = layer_scales(fix, norms)
    assert fixed.scaling.scales == scales
    assert fixed.gradients == plain.gradients
    for layer, scale in enumerate(scales):
        assert fixed.scaling.after[layer].mean == pytest.approx(scale * plain.gradients[layer].mean)
        if method == "taylor_2nd":
            first, second = run_engine(model, ids, "taylor").mlp[layer], run_engine(model, ids, "fisher").mlp[layer]
            expected = scale * first + scale**2 * second
        else:
            expected = scale ** (1 if method == "taylor" else 2) * plain.mlp[layer]
        torch.testing.assert_close(fixed.mlp[layer], expected, rtol=1e-6, atol=0.0)


def test_fixing_samples_does_not_depend_on_the_batch_split() -> None:
    model, ids = tiny_model(layers=4), tiny_ids(samples=6)
    one, three = (run_engine(model, ids, "fisher", batch_size=size, gradient_fix="adaptive") for size in (6, 2))
    for a, b in zip(one.mlp, three.mlp, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0.0)


def test_each_batch_is_scaled_by_its_own_scales() -> None:
    """a = |w mean_b s_b g_b| and h = mean_b s_b^2 g_b^2, each batch with its own scales."""
    model, ids = tiny_model(layers=3), tiny_ids(samples=4)
    scores = run_engine(model, ids, "taylor_2nd", "batch", batch_size=2, gradient_fix="normalize")
    mlp = model.model.layers[0].mlp
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T]
    means, squares = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for batch in ids.split(2):
        model.zero_grad()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("proj.weight"))
        model(input_ids=batch, labels=batch).loss.backward()
        normalize_gradients_per_layer(model)
        grads = mlp.gate_proj.weight.grad, mlp.up_proj.weight.grad, mlp.down_proj.weight.grad.T
        for mean, square, grad in zip(means, squares, grads, strict=True):
            mean += grad / 2
            square += grad**2 / 2
    expected = sum(
        ((weight * mean).abs() + 0.5 * weight**2 * square).sum(1)
        for weight, mean, square in zip(weights, means, squares, strict=True)
    )
    torch.testing.assert_close(scores.mlp[0].double(), expected.detach(), rtol=1e-6, atol=0.0)
    assert scores.scaling.scales != [1.0] * 3


@pytest.mark.parametrize("fix", ["normalize", "auto"])
def test_reported_scales_are_means_over_the_batches(fix: str) -> None:
    """The first layer's gradients are so small that "auto" chooses a fix."""
    model, ids = tiny_model(layers=3), tiny_ids(samples=4)
    model.model.layers[0].register_forward_hook(lambda _module, _args, output: output / 2000.0 + output.detach())
    plain = [run_engine(model, batch, "taylor", "batch").gradients for batch in ids.split(2)]
    found = run_engine(model, ids, "taylor", "batch", batch_size=2, gradient_fix=fix).scaling
    scales = [scales_of(fix, of_batch, 3) for of_batch in plain]
    assert found.fix == {"normalize": "normalize", "auto": "adaptive"}[fix]
    assert scales[0] != scales[1]
    assert found.scales == pytest.approx([(a + b) / 2.0 for a, b in zip(*scales, strict=True)], rel=1e-12)
    scaled = [[layer.scaled(own[layer.layer]) for layer in step] for step, own in zip(plain, scales, strict=True)]
    for have, want in zip(found.after, pool_steps(scaled), strict=True):
        assert vars(have).keys() == vars(want).keys()
        for name, value in vars(want).items():
            assert getattr(have, name) == pytest.approx(value, rel=1e-9), name
