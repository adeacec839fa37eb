"""The layers' statistics against their definitions over all elements, in fp64, and the conclusions from them."""

import pytest
import torch

from gradprune.ops.vectors import GradientStatistics
from gradprune.vanishing.analysis import GradientAnalysis
from gradprune.vanishing.diagnosis import diagnose_gradients, stablest
from gradprune.vanishing.scaling import GradientScaling
from gradprune.vanishing.statistics import LayerGradients, layer_gradients

SHAPES = {"self_attn.q_proj": (5, 7), "mlp.up_proj": (3, 4)}


def gradients(samples: int) -> dict[str, torch.Tensor]:
    """Random gradients by weight name, each [samples, O, I] fp64."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(samples, *shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()
    }


def statistics_of(own: dict[str, torch.Tensor]) -> LayerGradients:
    found = {
        name: GradientStatistics(*(value.item() for value in (g.sum(), g.square().sum(), g.max(), g.min())), 0.0)
        for name, g in ((name, g.abs()) for name, g in own.items())
    }
    return layer_gradients(2, found, {name: g[0].numel() for name, g in own.items()}, len(next(iter(own.values()))))


def by_elements(own: dict[str, torch.Tensor]) -> dict[str, object]:
    """Return the fields of `LayerGradients` by the definitions in its docstring."""
    everything = torch.cat([g.flatten(1) for g in own.values()], 1)
    absolute = everything.abs()
    return {
        "layer": 2,
        "mean": absolute.mean().item(),
        "std": absolute.std(correction=0).item(),
        "norm": everything.square().sum(1).mean().sqrt().item(),
        "maximum": absolute.max().item(),
        "minimum": absolute.min().item(),
        "parameter_norms": {name: g.flatten(1).square().sum(1).mean().sqrt().item() for name, g in own.items()},
    }


def assert_fields(found: LayerGradients, expected: dict[str, object]) -> None:
    assert vars(found).keys() == expected.keys()
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-13), name


@pytest.mark.parametrize("samples", [1, 3])
def test_statistics_are_those_of_all_elements_and_samples(samples: int) -> None:
    own = gradients(samples)
    assert_fields(statistics_of(own), by_elements(own))


def test_scaled_statistics_are_those_of_scaled_gradients() -> None:
    own = gradients(3)
    assert_fields(statistics_of(own).scaled(0.3), by_elements({name: 0.3 * g for name, g in own.items()}))


def layers(*means: float) -> list[LayerGradients]:
    return [LayerGradients(layer, mean, 0.0, mean, mean, mean, {"w": mean}) for layer, mean in enumerate(means)]


def test_ties_between_ratios_are_broken_by_the_shorter_length() -> None:
    two, three = diagnose_gradients(layers(2.0, 1.0)), diagnose_gradients(layers(3.0, 1.0))
    assert stablest({512: two, 128: three, 256: two, 1024: two}) == 256


def test_a_layer_vanishes_below_a_hundredth_of_the_largest() -> None:
    assert diagnose_gradients(layers(100.0, 1.0, 0.99)).vanishing == [2]


@pytest.mark.parametrize(("ratio", "warned"), [(99.0, True), (101.0, False)])
def test_an_unneeded_fix_is_reported(ratio: float, warned: bool) -> None:
    before = layers(ratio, 1.0)
    scaling = GradientScaling("adaptive", [1.0, 10.0], [before[0], before[1].scaled(10.0)])
    text = GradientAnalysis(
        before, [], "adaptive", scaling, seq_len=8, num_samples=1, reduction="sample"
    ).scaling_text()
    assert text.startswith(f"Gradient fix 'adaptive': gradient ratio {ratio:.1f} before, {ratio / 10.0:.1f} after.")
    assert ("a fix is not needed" in text) == warned
