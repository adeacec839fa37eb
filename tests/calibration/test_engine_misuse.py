"""Steps that fail leave no trace, and an engine that is used wrongly says so and leaves the model as it was."""

import pytest
import torch
from transformers import BatchEncoding, LlamaConfig, LlamaForSequenceClassification

from gradprune import ImportanceEngine
from gradprune.errors import ConfigError, GradPruneError, UnsupportedArchitectureError
from helpers.tiny_models import tiny_ids, tiny_model


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def assert_untouched(model) -> None:
    assert hooks(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_a_step_that_raised_leaves_no_trace(reduction: str) -> None:
    model, ids = tiny_model(), tiny_ids(samples=4, tokens=12)
    broken = model.model.layers[0].mlp.down_proj

    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    with ImportanceEngine(model, reduction=reduction) as undisturbed:
        for batch in ids.split(2):
            undisturbed.step(batch)
    with ImportanceEngine(model, reduction=reduction) as engine:
        engine.step(ids[:2])
        with pytest.raises(GradPruneError, match="vocabulary"):
            engine.step(torch.full((2, 12), 10**6))
        # In the backward pass, after the engine has observed the later layers.
        handle = broken.register_full_backward_pre_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step(ids[2:])
        handle.remove()
        engine.step(ids[2:])
    for method in ("taylor", "fisher", "group_fisher", "wanda"):
        found, expected = engine.scores(method), undisturbed.scores(method)
        assert all(map(torch.equal, found.mlp, expected.mlp))
        assert all(map(torch.equal, found.attention, expected.attention))
    assert engine.gradients() == undisturbed.gradients()
    assert engine.gate_gradients() == undisturbed.gate_gradients()


def test_an_engine_is_entered_once_at_a_time() -> None:
    model, ids = tiny_model(), tiny_ids(samples=2, tokens=8)
    engine = ImportanceEngine(model)
    with engine:
        with pytest.raises(GradPruneError, match="this engine is open already"):
            engine.__enter__()
        engine.step(ids)
    assert_untouched(model)
    with engine:
        engine.step(ids)
    assert_untouched(model)


def test_two_engines_cannot_observe_one_model_at_the_same_time() -> None:
    model, ids = tiny_model(), tiny_ids(samples=2, tokens=8)
    with ImportanceEngine(model) as outer:
        with pytest.raises(GradPruneError, match="another engine observes this model"):
            ImportanceEngine(model).__enter__()
        outer.step(ids)
    assert outer.scores().mlp[0].isfinite().all()
    assert_untouched(model)
    with ImportanceEngine(model, method="wanda") as later:
        later.step(ids)
    assert_untouched(model)


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (torch.ones(8, dtype=torch.int64), r"shape \(8,\)"),
        (torch.ones(1, 2, 8, dtype=torch.int64), r"shape \(1, 2, 8\)"),
        (torch.ones(2, 8), "float32"),
        ([[1, 2, 3]], "list"),
        (BatchEncoding({"input_ids": torch.ones(2, 8, dtype=torch.int64)}), "BatchEncoding"),
        (torch.ones(2, 0, dtype=torch.int64), r"shape \(2, 0\)"),
        (torch.ones(2, 1, dtype=torch.int64), r"shape \(2, 1\)"),
        (torch.ones(0, 8, dtype=torch.int64), r"shape \(0, 8\)"),
        (torch.full((2, 8), -1), "go from -1"),
    ],
)
def test_invalid_input_ids_are_refused(ids, named: str) -> None:
    model = tiny_model()
    with ImportanceEngine(model) as engine, pytest.raises(GradPruneError, match=rf"input_ids: .*{named}"):
        engine.step(ids)
    assert_untouched(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_step_computes_gradients_in_any_mode_of_autograd(mode) -> None:
    model, ids = tiny_model(), tiny_ids(samples=2, tokens=8)
    with ImportanceEngine(model) as expected:
        expected.step(ids)
    with ImportanceEngine(model) as engine, mode():
        engine.step(ids)
    assert all(map(torch.equal, engine.scores().mlp, expected.scores().mlp))


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("method", ["taylor_2nd", "obs", "wanda"])
def test_an_engine_may_be_made_in_inference_mode(method, reduction) -> None:
    model, ids = tiny_model(), tiny_ids(samples=2, tokens=8)
    with ImportanceEngine(model, method, reduction) as expected:
        expected.step(ids)
    with torch.inference_mode():
        inside = ImportanceEngine(model, method, reduction)
        restored = ImportanceEngine(model, method, reduction)
        restored.restore(expected.state(), [ids])
    with inside:
        inside.step(ids)
    for engine in (inside, restored):
        assert all(map(torch.equal, engine.scores().mlp, expected.scores().mlp))


def test_a_model_that_predicts_no_token_is_refused() -> None:
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, pad_token_id=0
    )
    with pytest.raises(UnsupportedArchitectureError, match="LlamaForSequenceClassification predicts no next token"):
        ImportanceEngine(LlamaForSequenceClassification(config))


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="weights are on no device"):
        ImportanceEngine(tiny_model().to("meta"))


def test_dropout_is_off_and_each_modules_own_mode_is_restored() -> None:
    model, ids = tiny_model(), tiny_ids(samples=2, tokens=8)
    model.train()
    model.model.layers[0].eval()
    for method in ("group_fisher", "wanda"):
        with ImportanceEngine(model, method=method) as engine:
            assert not any(module.training for module in model.modules())
            engine.step(ids)
        assert model.training
        assert not model.model.layers[0].training
