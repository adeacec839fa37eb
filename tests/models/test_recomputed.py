"""Layers that are recomputed in the backward pass: the same gradients, without products that no gradient needs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradprune.calibration.capture import observed_linear
from gradprune.calibration.engine import ImportanceEngine
from gradprune.models import describe
from gradprune.models.recomputed import Recomputation, recomputed
from helpers.architectures import tiny
from helpers.engine_runs import run_engine
from helpers.tiny_models import tiny_ids, tiny_model


class Layer(nn.Module):
    """A layer that adds a product to its input; with `read` it squares the sum, so a gradient reads the product."""

    def __init__(self, read: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        self.read = read
        self.runs = 0
        self.recomputation = Recomputation()
        self.requires_grad_(False)

    def forward(self, stream: Tensor, beside: tuple[Tensor, Tensor | None], *, scale: float = 1.0):
        self.runs += 1
        product = self.recomputation.product(self.linear, self.linear)
        product = observed_linear(stream.tanh(), self.linear.weight, self.linear.bias, lambda *_: None, product)
        self.recomputation.computed(self.linear, product)
        total = stream + scale * product * 1.0 + (0.0 if beside[1] is None else beside[1])
        return (total.square() if self.read else total), beside[0], "not a tensor"


def gradients(layer: Layer, again: bool) -> list[Tensor]:
    """The gradients of both inputs, given an output gradient of 2; `again`: whether the layer is recomputed."""
    generator = torch.Generator().manual_seed(0)
    stream, other = (torch.randn(2, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    layers = nn.ModuleList([layer])
    if not again:
        after, _, text = layer(stream * 1.0, (torch.ones(3), other), scale=3.0)
    else:
        with recomputed(layers, layer.recomputation):
            after, _, text = layers[0](stream * 1.0, (torch.ones(3), other), scale=3.0)
    assert text == "not a tensor"
    assert not after.requires_grad or type(after.grad_fn).__name__.startswith("_Recomputed") == again
    return list(torch.autograd.grad(after, (stream, other), torch.full_like(after, 2.0)))


@pytest.mark.parametrize("read", [False, True])
def test_gradients_equal_those_without_recomputation(read: bool) -> None:
    """This includes inputs nested in other arguments, beside values that have no gradient."""
    layer = Layer(read)
    expected = gradients(layer, again=False)
    for step in range(3):
        assert all(map(torch.equal, gradients(layer, again=True), expected)), step
    assert layer.runs == 1 + 3 * 2


@pytest.mark.parametrize("read", [False, True])
def test_the_last_product_is_left_out_if_nothing_reads_it(read: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, products = Layer(read), []
    product = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: [products.append(1), product(*args)][1])
    counts = []
    for _ in range(3):
        products.clear()
        gradients(layer, again=True)
        counts.append(len(products))
    assert counts == ([2, 2, 2] if read else [2, 1, 1])


def test_a_product_that_is_left_out_enters_no_result() -> None:
    """With deterministic algorithms on, torch fills uninitialised memory with NaN, which would show in the scores."""
    model, ids = tiny_model(layers=2), tiny_ids()
    expected = run_engine(model, ids)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = run_engine(model, ids, use_gradient_checkpointing=True)
    finally:
        torch.use_deterministic_algorithms(False)
    pairs = zip([*found.attention, *found.mlp], [*expected.attention, *expected.mlp], strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(("architecture", "left_out"), [("granite", True), ("gpt_neox", True), ("gemma2", False)])
def test_the_last_product_is_not_left_out_if_a_norm_follows(architecture: str, left_out: bool) -> None:
    """In Gemma 2 a norm follows the MLP, and its gradient reads the last product."""
    model, ids = tiny(architecture), tiny_ids(vocab=50)
    counts = []
    with ImportanceEngine(model, backend="reference", use_gradient_checkpointing=True) as engine:
        for _ in range(2):
            before = torch.autograd.profiler.profile()
            with before:
                engine.step(ids)
            counts.append(sum(event.name in ("aten::mm", "aten::addmm") for event in before.function_events))
    assert (counts[0] - counts[1] == len(describe(model).layers)) == left_out
    assert (counts[0] == counts[1]) != left_out


def test_nothing_is_left_out_of_a_layer_that_raised() -> None:
    layer = Layer()
    recomputation = layer.recomputation

    def raising() -> None:
        with recomputation.of(layer):
            recomputation.computed(layer.linear, torch.ones(2, 3))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        raising()
    with recomputation.of(layer):
        assert recomputation.product(layer.linear, layer.linear) is layer.linear


def test_layers_are_computed_again_under_the_same_autocast() -> None:
    model, ids = tiny_model(layers=2, dtype=torch.float32), tiny_ids()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (run_engine(model, ids, use_gradient_checkpointing=again) for again in (True, False))
    assert all(map(torch.equal, found.mlp, expected.mlp))
    assert not torch.equal(run_engine(model, ids).mlp[0], expected.mlp[0])
