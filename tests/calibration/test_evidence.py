import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gradprune import ImportanceEngine
from gradprune.calibration.evidence import Evidence
from gradprune.calibration.methods import Depth, components_at
from gradprune.config import Scoring
from gradprune.errors import CheckpointError, ConfigError, NonFiniteError
from gradprune.models import describe
from gradprune.scoring.choose import score_groups
from gradprune.scoring.table import empty_table
from helpers.pipeline_runs import run
from helpers.tiny_models import METHODS, tiny_model

SAME = ("model/model.safetensors", "model/config.json", "analysis/groups.csv", "analysis/evidence.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "tau": 0.0},
        {"importance_method": "taylor_2nd", "gradient_fix": "adaptive+depth:sqrt"},
        {"importance_method": "wanda", "normalize_scores": "log", "repair": "none"},
        {"importance_method": "taylor", "reduction": "batch", "gradient_fix": "normalize"},
        {"prior": "taylor", "temperature": 0.5},
    ],
)
def test_pruning_from_an_evidence_file_gives_the_bytes_of_a_full_run(options, tmp_path: Path) -> None:
    full = {"output_dir": str(tmp_path), **options}
    run(tiny_model(dtype=torch.float32), output_name="first", pruning_ratio=0.3, **full)
    run(tiny_model(dtype=torch.float32), output_name="full", pruning_ratio=0.1, **full)
    scores = str(tmp_path / "first" / "analysis" / "evidence.safetensors")
    run(tiny_model(dtype=torch.float32), output_name="reused", pruning_ratio=0.1, evidence_file=scores, **full)
    for file in SAME:
        assert (tmp_path / "full" / file).read_bytes() == (tmp_path / "reused" / file).read_bytes(), file
    gradients = [json.loads((tmp_path / n / "analysis" / "gradients.json").read_text()) for n in ("full", "reused")]
    assert gradients[0] == gradients[1]


def test_scores_of_one_method_serve_every_other(tmp_path: Path) -> None:
    collected = {"importance_method": "magnitude", "evidence": "all"}
    run(tiny_model(dtype=torch.float32), output_name="a", output_dir=str(tmp_path), **collected)
    scores = str(tmp_path / "a" / "analysis" / "evidence.safetensors")
    for method in METHODS:
        full = run(tiny_model(dtype=torch.float32), importance_method=method)
        reused = run(tiny_model(dtype=torch.float32), importance_method=method, evidence_file=scores)
        np.testing.assert_array_equal(full.table.score, reused.table.score)


def test_the_file_holds_one_vector_per_component(tmp_path: Path) -> None:
    result = run(tiny_model(), output_name="a", output_dir=str(tmp_path), evidence="all")
    found = load_file(tmp_path / "a" / "analysis" / "evidence.safetensors")
    assert set(found) == {*components_at(Depth.WEIGHTS), "obs"} - {"reap"}
    assert all(vector.shape == (len(result.table),) and vector.dtype == np.float64 for vector in found.values())


def test_another_models_scores_are_refused(tmp_path: Path) -> None:
    run(tiny_model(), output_name="a", output_dir=str(tmp_path))
    scores = tmp_path / "a" / "analysis" / "evidence.safetensors"
    with pytest.raises(CheckpointError, match=r"was measured on another model than this one"):
        run(tiny_model(seed=1), evidence_file=str(scores))
    with pytest.raises(CheckpointError, match=r"evidence_file: there is no file"):
        run(tiny_model(), evidence_file=str(tmp_path / "nothing"))
    scores.write_bytes(scores.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"is not a whole evidence file"):
        run(tiny_model(), evidence_file=str(scores))


def test_evidence_with_batch_reduction_cannot_be_rescaled(tmp_path: Path) -> None:
    options = {"importance_method": "taylor", "reduction": "batch"}
    run(tiny_model(), output_name="a", output_dir=str(tmp_path), gradient_fix="adaptive", **options)
    scores = str(tmp_path / "a" / "analysis" / "evidence.safetensors")
    with pytest.raises(ConfigError, match=r"gradient_fix: 'normalize' needs another calibration; .* had 'adaptive'"):
        run(tiny_model(), evidence_file=scores, gradient_fix="normalize", **options)


def test_a_saved_file_reads_back_equal(tmp_path: Path) -> None:
    model = tiny_model()
    evidence = run(model, temperature=1.0, evidence="all").evidence
    evidence.save(tmp_path / "evidence.safetensors")
    again = Evidence.load(tmp_path / "evidence.safetensors", model)
    assert again.priors == evidence.priors
    assert again.gradients == evidence.gradients
    assert again.steps == evidence.steps
    assert again.components.keys() == evidence.components.keys()
    for name in evidence.components:
        assert torch.equal(again.components[name], evidence.components[name])


def test_only_windows_of_the_same_text_and_options_count_as_taken() -> None:
    found = replace(
        ImportanceEngine(tiny_model(), "magnitude").evidence(),
        num_samples=10,
        seq_len=16,
        seed=3,
        dataset="a",
        own_text=0.2,
    )
    assert found.windows_taken("a", 16, 3) == 8
    assert [found.windows_taken(*other) for other in (("b", 16, 3), ("a", 8, 3), ("a", 16, 4))] == [0, 0, 0]


def test_a_nan_importance_is_named() -> None:
    found = ImportanceEngine(tiny_model(), "magnitude").evidence()
    values = found.components["magnitude"].clone()
    groups = list(found.blocks.values())
    # The fifth channel of layer 1, after both blocks of layer 0 and the attention of layer 1.
    values[sum(groups[:3]) + 4] = float("nan")
    with pytest.raises(NonFiniteError, match="mlp group 4 of layer 1"):
        replace(found, components={"magnitude": values})


def test_a_table_has_importance_per_parameter_as_score() -> None:
    view = describe(tiny_model())
    found = ImportanceEngine(view.model, "magnitude").evidence()
    table = score_groups(view, found, Scoring(importance_method="magnitude"))
    assert len(table) == len(empty_table(view)) == sum(found.blocks.values())
    assert (table.score == table.importance / table.cost).all()
