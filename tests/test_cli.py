import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gradprune.checkpoint.save import save_checkpoint
from gradprune.cli import main
from gradprune.demo.model import byte_tokenizer
from helpers.tiny_models import tiny_model

QUICK = ["--num_samples", "8", "--seq_len", "16", "--batch_size", "4"]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    save_checkpoint(tiny_model(channels=24, vocab=300), byte_tokenizer(), folder)
    return folder


@pytest.fixture
def ids_file(tmp_path: Path) -> Path:
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 61, 3000))
    return path


@pytest.fixture
def gradprune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run the command in an empty folder; returns exit code, standard output and standard error."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradprune", *map(str, arguments)])
        capsys.readouterr()  # what the fixtures printed
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    yield run
    signal.signal(signal.SIGTERM, handler)


def test_prune_writes_a_model_that_eval_loads(gradprune, model_folder: Path, ids_file: Path) -> None:
    code, out, _ = gradprune(
        "prune", "--base_model", model_folder, "--dataset", ids_file, "--output_name", "x",
        "--importance_method", "taylor_2nd", "--temperature", "1", "--tau", "0", *QUICK,
    )  # fmt: skip
    assert code == 0
    assert "perplexity" in out
    summary = json.loads(Path("results/x/analysis/summary.json").read_text())
    code, out, _ = gradprune("eval", "--model", "results/x/model", "--dataset", ids_file, "--seq_len", "16", "--json")
    assert code == 0
    assert json.loads(out)["parameters"] == summary["parameters"]["after"]


@pytest.mark.parametrize("style", [lambda name: name, lambda name: name.replace("_", "-")], ids=["_", "-"])
def test_options_may_be_written_with_either_dash(gradprune, model_folder: Path, ids_file: Path, style) -> None:
    options = {"--base_model": model_folder, "--dataset": ids_file, "--output_name": "x", "--pruning_ratio": "0.3"}
    arguments = [part for name, value in options.items() for part in (style(name), value)]
    assert gradprune("prune", *arguments, *(style(part) for part in QUICK), style("--no_measure_speed"))[0] == 0
    assert json.loads(Path("results/x/run.json").read_text())["config"]["pruning_ratio"] == 0.3


def test_the_default_output_name_tells_what_it_is(gradprune, model_folder: Path, ids_file: Path) -> None:
    assert gradprune("prune", "--base_model", model_folder, "--dataset", ids_file, *QUICK)[0] == 0
    assert [path.name for path in Path("results").iterdir()] == ["tiny-group_fisher-0.2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pruning_ratio", "1.5"], "pruning_ratio: 1.5 is not between 0 and 1"),
        (["--pruning_ratio", "much"], "pruning_ratio: 'much' is not a number"),
        (["--pruning_ratio", "0.95"], "pruning_ratio: 0.95 cannot be reached"),
        (["--importance_method", "best"], "'best' is not one of"),
        (["--no_such_option"], "No such option"),
        (["--seq_len", "65"], "seq_len: 65 is longer than the model's context of 64"),
        (["--num_samples", "4000"], "num_samples: 4000 samples"),
        (["--device", "abacus"], "device: 'abacus' does not work here"),
        (["--backend", "cuda"], "backend: 'cuda' cannot run on cpu"),
        (["--dataset", "no-such-file.txt"], "there is no file 'no-such-file.txt'"),
        (["--dataset", "text.pdf"], "dataset: 'text.pdf'"),
        (["--base_model", "./nowhere"], "base_model: "),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(
    gradprune, model_folder: Path, ids_file: Path, arguments: list[str], message: str
) -> None:
    given = ["--base_model", model_folder, "--dataset", ids_file, *QUICK]
    code, out, err = gradprune("prune", *given, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert not Path("results").exists()


def test_an_existing_output_folder_is_refused_before_anything_is_loaded(gradprune) -> None:
    Path("results/x").mkdir(parents=True)
    code, _, err = gradprune("prune", "--base_model", "./nowhere", "--output_name", "x")
    assert code == 2
    assert err.startswith("error: output_name: 'results/x' exists")


def test_a_truncated_checkpoint_is_refused(gradprune, model_folder: Path, ids_file: Path) -> None:
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = gradprune("prune", "--base_model", model_folder, "--dataset", ids_file, *QUICK)
    assert code == 2
    assert err.startswith("error: base_model: ")
    assert len(err.strip().splitlines()) == 1


def test_an_unsupported_architecture_is_refused_by_name(gradprune, model_folder: Path, ids_file: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2", "architectures": None}))
    code, _, err = gradprune("prune", "--base_model", model_folder, "--dataset", ids_file, *QUICK)
    assert code == 2
    assert "architecture 'gpt2'" in err
    assert "llama, mistral, phi3, qwen2, qwen3" in err


def test_a_nan_weight_is_named(gradprune, tmp_path: Path, ids_file: Path) -> None:
    model = tiny_model(channels=24)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    save_checkpoint(model, None, tmp_path / "nan")
    code, _, err = gradprune("prune", "--base_model", tmp_path / "nan", "--dataset", ids_file, *QUICK)
    assert code == 2
    assert err.startswith("error: loss of calibration sample 0 is nan, first in the output of layer 1")
    assert not Path("results").exists()


def test_diagnose_shows_every_layer(gradprune, model_folder: Path, ids_file: Path) -> None:
    arguments = ("--base_model", model_folder, "--dataset", ids_file, *QUICK)
    code, out, _ = gradprune("diagnose", *arguments)
    assert code == 0
    assert "Gradients at 16 tokens" in out
    assert "normal" in out
    code, out, _ = gradprune("diagnose", *arguments, "--json")
    assert len(json.loads(out)["layers"]) == 3


def test_info_says_why_a_backend_does_not_work(gradprune) -> None:
    code, out, _ = gradprune("info", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["backends"]["cpu"]["reference"] is None
    assert found["backends"]["cpu"]["cuda"]
    assert found["gradient_backends"]["cpu"]["reference"] is None
    assert "no gradient op has a Triton kernel" in found["gradient_backends"]["cpu"]["triton"]
    assert found["versions"]["torch"]
    assert gradprune("info")[0] == 0


def test_help_fits_80_columns(gradprune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in ([], ["prune"], ["demo"], ["diagnose"], ["eval"], ["info"]):
        code, out, _ = gradprune(*command, "--help")
        assert code == 0
        assert max(map(len, out.splitlines())) <= 80


def test_a_terminated_run_leaves_nothing(tmp_path: Path, model_folder: Path, ids_file: Path) -> None:
    command = [
        sys.executable, "-c", "from gradprune.cli import main; main()",
        "prune", "--base_model", str(model_folder), "--dataset", str(ids_file), "--output_name", "x",
        "--output_dir", str(tmp_path / "results"), *QUICK, "--num_samples", "180", "--batch_size", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    # The results folder's hidden forerunner appears while the results are written; until then there is nothing.
    while process.poll() is None and time.monotonic() < deadline and not list(tmp_path.glob("results/.x.partial*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    left = [path.name for path in tmp_path.glob("results/*")]
    # Either it was caught half way and took its folder with it, or it had just finished.
    assert left in ([], ["x"])
    assert not list(tmp_path.glob("results/.x*"))


@pytest.mark.parametrize("blocked", ["triton", "gradprune._C"])
def test_the_package_imports_without(blocked: str) -> None:
    code = (
        f"import sys; sys.modules[{blocked!r}] = None\n"
        "import gradprune, gradprune.cli, gradprune.config\n"
        "assert 'torch' not in sys.modules, 'import gradprune is not light'\n"
        "from gradprune import ImportanceEngine, prune, load_pruned\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
