"""`--config`: options from a YAML file or from an earlier run's `run.json`."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from gradprune.checkpoint.save import save_checkpoint
from gradprune.cli import main
from gradprune.config.options_file import options_from_file
from gradprune.demo.model import byte_tokenizer
from gradprune.errors import ConfigError
from helpers.tiny_models import tiny_model

ACCEPTED = ("base_model", "num_samples", "pruning_ratio", "measure_speed", "output_name", "evidence_file")
QUICK = "num_samples: 8\nseq-len: 16\nbatch_size: 4\nbackend: reference\nmeasure_speed: false\n"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_checkpoint(tiny_model(channels=24, vocab=300), byte_tokenizer(), tmp_path / "tiny")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 61, 3000))
    (tmp_path / "run.yaml").write_text(QUICK + "base_model: tiny\ndataset: ids.npy\noutput_name: 2026-11-24\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def gradprune(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradprune", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def recorded(name: str) -> dict:
    return json.loads(Path("results", name, "run.json").read_text())["config"]


def written(folder: Path, text: str) -> str:
    (folder / "x.yaml").write_text(text)
    return str(folder / "x.yaml")


def test_the_file_gives_options_and_the_command_line_overrides_them(gradprune) -> None:
    code, _, err = gradprune("prune", "--num_samples", "4", "--config", "run.yaml", "--pruning_ratio", "0.1")
    assert code == 0, err
    config = recorded("2026-11-24")
    assert (config["num_samples"], config["seq_len"], config["measure_speed"]) == (4, 16, False)
    assert config["pruning_ratio"] == 0.1


def test_a_run_repeated_from_its_record_gives_the_same_model(gradprune, work: Path) -> None:
    scoring = ["--importance_method", "fisher", "--temperature", "1", "--tau", "inf", "--clip_percentile", "99"]
    code, _, err = gradprune("prune", "--config", "run.yaml", "--output_name", "one", *scoring)
    assert code == 0, err
    code, _, err = gradprune("prune", "--config", "results/one/run.json", "--output_name", "two")
    assert code == 0, err
    assert recorded("two") == {**recorded("one"), "output_name": "two"}
    weights = [(work / "results" / name / "model" / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    # Other commands read from the same record the options that they have.
    code, out, err = gradprune("eval", "--config", "results/one/run.json", "--model", "results/one/model", "--json")
    assert code == 0, err
    summary = json.loads((work / "results" / "one" / "analysis" / "summary.json").read_text())
    assert json.loads(out)["parameters"] == summary["parameters"]["after"]
    code, out, err = gradprune("diagnose", "--config", "results/one/run.json", "--json")
    assert code == 0, err
    assert json.loads(out)["seq_len"] == 16


def test_eval_measures_on_the_evaluation_text_of_a_record(gradprune, work: Path) -> None:
    np.save("other.npy", np.random.default_rng(1).integers(3, 61, 500))
    code, _, err = gradprune("prune", "--config", "run.yaml", "--output_name", "one", "--eval_dataset", "other.npy")
    assert code == 0, err
    summary = json.loads((work / "results" / "one" / "analysis" / "summary.json").read_text())
    code, out, err = gradprune("eval", "--config", "results/one/run.json", "--model", "results/one/model", "--json")
    assert (code, err) == (0, "Loading the model ...\n")
    assert json.loads(out)["perplexity"] == pytest.approx(summary["perplexity"]["after"], rel=1e-6)
    # Without an evaluation text, `eval` measures on the calibration text and warns about it.
    code, _, err = gradprune("prune", "--config", "run.yaml", "--output_name", "two")
    assert code == 0, err
    code, _, err = gradprune("eval", "--config", "results/two/run.json", "--model", "results/two/model")
    assert code == 0
    assert err.startswith("warning: config: 'results/two/run.json' has no eval_dataset; unless --dataset names another")


def test_a_recovery_can_be_repeated_from_its_record(gradprune) -> None:
    train = ["--model", "tiny", "--method", "full", "--loss", "lm", "--steps", "2", "--seq_len", "16"]
    code, _, err = gradprune("recover", *train, "--dataset", "ids.npy", "--output_name", "one")
    assert code == 0, err
    code, _, err = gradprune("recover", "--config", "results/one/run.json", "--output_name", "two")
    assert code == 0, err
    assert recorded("two") == {**recorded("one"), "output_name": "two"}


def test_an_unknown_key_is_refused_with_the_nearest_name(gradprune, work: Path) -> None:
    code, _, err = gradprune("prune", "--config", written(work, "pruning_ration: 0.3\n"))
    assert code == 2
    assert err == (
        f"error: config: 'pruning_ration' in '{work / 'x.yaml'}' is not an option of gradprune prune; the nearest "
        "is pruning_ratio\n"
    )
    code, _, err = gradprune("eval", "--config", written(work, "temperature: 1\n"))
    assert code == 2
    assert "'temperature' in" in err


def test_a_value_outside_its_domain_is_refused_as_on_the_command_line(gradprune, work: Path) -> None:
    code, _, err = gradprune("prune", "--config", written(work, "num_samples: 0\n"))
    assert (code, err) == (2, "error: num_samples: 0 is not a whole number of at least 1\n")
    code, _, err = gradprune("prune", "--config", written(work, "num_samples: many\n"))
    assert code == 2
    assert "--num-samples" in err


@pytest.mark.parametrize(
    "text", ["- a\n", "just text", "", "a: [\n", "\t", "num_samples: {a: 1}\n", "num_samples: [[1]]\n"]
)
def test_a_file_that_is_no_mapping_of_options_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^config: "):
        options_from_file(written(tmp_path, text), ACCEPTED, "prune")


def test_names_may_have_hyphens_and_null_values_are_left_out(tmp_path: Path) -> None:
    text = "evidence-file: a\nbase-model: ~\nnum_samples: 1e3\npruning_ratio: [0.1, 0.2]\noutput_name:\n"
    found = options_from_file(written(tmp_path, text), ACCEPTED, "prune")
    assert found == {"evidence_file": "a", "num_samples": "1e3", "pruning_ratio": "0.1,0.2"}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        options_from_file(str(tmp_path / "nowhere.yaml"), ACCEPTED, "prune")
