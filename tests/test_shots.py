"""Pruning in several shots: after each shot the model is repaired before the remaining groups are scored again."""

import copy

import pytest
import torch

from gradprune import ImportanceEngine, PruneConfig, prune
from gradprune.calibration.gather import gather_evidence
from gradprune.data.samples import draw_samples
from gradprune.errors import ConfigError
from gradprune.evaluation.size import model_size
from gradprune.models import describe
from gradprune.run import Run
from gradprune.scoring.choose import choose
from gradprune.shots import after_shots
from gradprune.surgery.least_squares import least_squares
from helpers.pipeline_runs import TOKENS, run
from helpers.tiny_models import tiny_model

OPTIONS = {"num_samples": 8, "seq_len": 16, "batch_size": 4, "backend": "reference", "pruning_ratio": 0.4}


def run_of(model, **options) -> Run:
    config = PruneConfig(**{**OPTIONS, **options})
    return Run(describe(model).with_groups(), config, draw_samples(model, None, config, TOKENS[:1500], TOKENS[1500:]))


def test_one_shot_uses_the_evidence_unchanged() -> None:
    whole = run_of(tiny_model(dtype=torch.float32))
    evidence = gather_evidence(whole)
    assert after_shots(whole, evidence) is evidence
    assert "shot_1" not in whole.clock.seconds


@pytest.mark.parametrize("method", ["obs", "group_fisher"])
def test_scores_are_measured_on_the_repaired_model(method: str) -> None:
    """The expected scores come from the single steps: select at half the ratio, repair a copy, and score it.

    The model is in fp64, because a run does not round products of fp64.
    """
    model = tiny_model()
    whole = run_of(model, importance_method=method, shots=2)
    evidence = gather_evidence(whole)
    masks = choose(whole.view, evidence, whole.config.scoring, whole.config.constraints, 0.2).masks
    repaired = copy.deepcopy(model)
    least_squares(describe(repaired), masks, whole.calibration, whole.held_out)
    engine = ImportanceEngine(repaired, method, backend="reference")
    with engine:
        for batch in whole.calibration:
            engine.step(batch)
    found = after_shots(whole, evidence)
    assert set(whole.clock.seconds) == {"calibration", "importance", "shot_1"}
    expected, changed = engine.scores().importance, False
    for block in whole.view.blocks:
        scores = found.scores(method).importance[block]
        assert torch.equal(scores, expected[block].masked_fill(~masks[block], 0.0))
        changed |= not torch.equal(scores, evidence.scores(method).importance[block])
    assert changed


def test_only_the_dense_model_s_weights_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense model's evidence can be saved; a shot's copy is discarded together with its evidence."""
    hashed = []
    monkeypatch.setattr("gradprune.calibration.gather.model_digest", lambda model: hashed.append(model) or "digest")
    model = tiny_model(dtype=torch.float32)
    assert run(model, shots=3).evidence.model == "digest"
    assert hashed == [model]


@pytest.mark.parametrize("method", ["obs", "group_fisher", "taylor", "magnitude"])
def test_each_shot_removes_more(method: str) -> None:
    model = tiny_model(dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = run(model, importance_method=method, pruning_ratio=0.2)
    found = run(model, importance_method=method, pruning_ratio=0.4, shots=2)
    for block in describe(model).blocks:
        assert (found.masks[block] <= first.masks[block]).all()
    # A block that loses all its groups is removed together with its norm.
    assert 0.35 < 1.0 - found.after.parameters / found.before.parameters < 0.41
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_search_chooses_the_method_for_the_shots() -> None:
    found = run(tiny_model(dtype=torch.float32), importance_method="auto", shots=2, search_samples=8)
    assert found.config.importance_method == found.search.winner.scoring.importance_method
    assert found.after.parameters < found.before.parameters


def test_a_target_is_met_by_the_last_scores() -> None:
    model = tiny_model(dtype=torch.float32)
    wanted = int(0.7 * model_size(model).parameters)
    config = PruneConfig(num_samples=8, seq_len=16, batch_size=4, target_parameters=str(wanted), shots=3)
    left = prune(model, None, config, calibration=TOKENS[:1500], evaluation=TOKENS[1500:]).after.parameters
    assert 0.9 * wanted < left <= wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 0}, "shots: 0 is not a whole number of at least 1"),
        ({"shots": 2, "repair": "none"}, "shots: 2 is given, but each further shot calibrates a repaired model"),
        ({"shots": 2, "prune_kinds": "experts"}, "shots: 2 is not possible with whole experts"),
    ],
)
def test_what_shots_cannot_do_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneConfig(**options)
