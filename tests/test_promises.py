"""What a run reports about itself, and the state in which it leaves the model."""

import json
from pathlib import Path

import pytest
import torch

from gradprune import PruneConfig, pipeline, prune
from gradprune.errors import CalibrationError, CheckpointError, ConfigError, SelectionError
from helpers.pipeline_runs import TOKENS, run
from helpers.tiny_models import tiny_model


def test_dropout_is_off_for_the_whole_run_and_every_mode_is_restored() -> None:
    options = {"temperature": 1.0, "tau": 0.0, "pruning_ratio": 0.3}
    expected = run(tiny_model(attention_dropout=0.5), **options)
    model = tiny_model(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    result = run(model, **options)
    assert [module.training for module in model.modules()] == modes
    assert (result.table.score == expected.table.score).all()
    assert result.after.perplexity == expected.after.perplexity


def test_every_mode_is_restored_after_an_error() -> None:
    model = tiny_model().train()
    with pytest.raises(SelectionError):
        run(model, pruning_ratio=0.99)
    assert all(module.training for module in model.modules())


def test_an_epsilon_that_removes_more_than_the_ratio_is_reported() -> None:
    result = run(tiny_model(), pruning_ratio=0.3, epsilon=0.5, attention_factor=1e-6)
    removed = result.table.cost[result.pruned].sum() / result.before.parameters
    said = [warning for warning in result.warnings if warning.startswith("epsilon 0.5 dropped whole layers")]
    assert bool(said) == (removed > 0.3)
    assert removed > 0.3, "this case drops no layer, and shows nothing"


@pytest.mark.parametrize("uniform", [False, True])
def test_a_ratio_that_prunes_nothing_says_what_would_prune_something(uniform: bool) -> None:
    model = tiny_model()
    result = run(model, pruning_ratio=1e-9, uniform=uniform)
    assert not result.pruned.any()
    # The least is one channel, or one channel of every layer if all widths must be equal.
    least = int(result.table.cost.min()) * (len(model.model.layers) if uniform else 1)
    (said,) = [warning for warning in result.warnings if warning.startswith("Nothing was pruned")]
    assert said.endswith(f"the least that can be removed is {least:,}.")
    assert run(model, pruning_ratio=(least + 1) / result.before.parameters, uniform=uniform).pruned.any()


@pytest.mark.parametrize("options", [{"temperature": 1e308, "tau": 0.0}, {"attention_factor": 5e-324}])
def test_scores_that_came_out_as_zero_are_reported(options: dict[str, float]) -> None:
    result = run(tiny_model(), **options)
    zeros = int((result.table.score == 0.0).sum())
    said = any("came out as 0" in warning for warning in result.warnings)
    assert said == (zeros > int(result.pruned.sum()))
    assert not any("came out as 0" in warning for warning in run(tiny_model()).warnings)


def evidence_of(model, folder: Path, **options) -> str:
    run(model, output_name="a", output_dir=str(folder), **options)
    return str(folder / "a" / "analysis" / "evidence.safetensors")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_evidence_of_a_model_with_another_embedding_norm_or_head_is_refused(tmp_path: Path, name: str) -> None:
    evidence = evidence_of(tiny_model(), tmp_path)
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(name)[-1] += 1.0
    with pytest.raises(CheckpointError, match="was measured on another model"):
        run(model, evidence_file=evidence)


def test_the_record_states_what_the_evidence_was_made_with(tmp_path: Path) -> None:
    evidence = evidence_of(tiny_model(), tmp_path, reduction="batch", num_samples=12)
    run(tiny_model(), evidence_file=evidence, output_name="b", output_dir=str(tmp_path), num_samples=20)
    record = json.loads((tmp_path / "b" / "run.json").read_text())
    assert record["calibration"]["num_samples"] == 12
    assert record["calibration"]["reduction"] == "batch"
    assert "measured on 12 samples of 16 tokens" in (tmp_path / "b" / "report.html").read_text()
    sample = evidence_of(tiny_model(), tmp_path / "sample")
    with pytest.raises(ConfigError, match="reduction: 'batch' needs another calibration"):
        run(tiny_model(), evidence_file=sample, reduction="batch")


def test_no_held_out_sample_is_one_that_the_evidence_was_calibrated_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    draw = pipeline.draw_samples
    monkeypatch.setattr(
        pipeline, "draw_samples", lambda *given, **named: drawn.append(draw(*given, **named)) or drawn[-1]
    )
    options = {"num_samples": 32, "importance_method": "auto", "search_minutes": 1e-3, "search_samples": 8}
    evidence = evidence_of(tiny_model(), tmp_path, **options, repair="least_squares")
    run(tiny_model(), **options | {"num_samples": 8}, repair="least_squares", evidence_file=evidence)
    (first, second), shared = drawn, lambda one, other: (one[:, None] == other).all(2).any()
    assert torch.equal(second.calibration, first.calibration[:8])
    assert len(second.held_out)
    assert len(second.searched)
    assert not shared(second.held_out, first.calibration)
    assert not shared(second.searched, first.calibration)


def test_a_missing_evidence_file_is_reported_before_samples_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "draw_samples", lambda *_given, **_named: pytest.fail("samples are drawn"))
    with pytest.raises(CheckpointError, match="there is no file"):
        run(tiny_model(), evidence_file="nowhere.safetensors", own_text=0.5, repair="least_squares")


@pytest.mark.parametrize("name", ["calibration", "evaluation"])
def test_ids_beyond_the_vocabulary_are_refused(name: str) -> None:
    tokens = {"calibration": TOKENS[:1500], "evaluation": TOKENS[1500:]}
    tokens[name] = tokens[name].clone()
    tokens[name][7] = 61
    with pytest.raises(CalibrationError, match=rf"^{name}: has ids from \d+ to 61; those of the model go from 0 to 60"):
        prune(tiny_model(), None, PruneConfig(num_samples=8, seq_len=16), **tokens)
