"""float16 has no numbers below 6e-8: the loss is scaled by a power of two, which is divided out exactly."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from gradprune.calibration.engine import ImportanceEngine
from gradprune.models.backward import loss_scale
from helpers.engine_runs import run_engine
from helpers.oracle import oracle_scores
from helpers.streaming import both
from helpers.tiny_models import tiny_ids, tiny_model


def with_small_gradients() -> PreTrainedModel:
    """A model whose head makes gradients about 2^-14 times as large as usual."""
    model = tiny_model(layers=2, channels=32, dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight *= 2.0**-14
    return model


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("method", ["taylor_2nd", "group_fisher"])
def test_gradients_below_the_range_of_float16_follow_fp64(method: str, reduction: str) -> None:
    model, ids = with_small_gradients(), tiny_ids(samples=4, tokens=17)
    found = run_engine(model, ids, method, reduction)
    expected = oracle_scores(model, ids, method, reduction, 2)
    for kind, blocks in zip(("attention", "mlp"), expected, strict=True):
        have, want = torch.cat(getattr(found, kind)).double(), torch.cat(blocks)
        # Values have 11 significant bits, and their errors pass through two layers.
        assert (have - want).norm() <= 0.03 * want.norm(), (kind, have, want)


@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_dividing_a_power_of_two_out_changes_no_bit(monkeypatch: pytest.MonkeyPatch, reduction: str) -> None:
    """Compared are all sums, gates and statistics that a step leaves; "obs" collects every one of them."""
    model, states = tiny_model(dtype=torch.float32), []
    for scale in (1.0, 2.0**10):
        monkeypatch.setattr("gradprune.models.backward.loss_scale", lambda _dtype, scale=scale: scale)
        monkeypatch.setattr("gradprune.calibration.engine.loss_scale", lambda _dtype, scale=scale: scale)
        with ImportanceEngine(model, "obs", reduction, "cpp") as engine:
            engine.step(tiny_ids())
        states.append(engine.state())
    plain, scaled = states
    assert plain.keys() == scaled.keys()
    assert [name for name in plain if not torch.equal(plain[name], scaled[name])] == []


def test_other_types_are_not_scaled() -> None:
    assert {loss_scale(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)} == {1.0}


def test_a_streamed_model_is_scaled_too(tmp_path: Path) -> None:
    batches = tiny_ids(samples=3).split(2)
    found = []
    for model in both(with_small_gradients(), tmp_path):
        with ImportanceEngine(model, "taylor_2nd", backend="reference", use_gradient_checkpointing=True) as engine:
            engine.steps(batches)
        found.append(engine.scores())
    for one, two in zip(found[0].attention + found[0].mlp, found[1].attention + found[1].mlp, strict=True):
        assert one.count_nonzero()
        assert torch.equal(one, two)
