import errno
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from gradprune.checkpoint.results import model_name
from gradprune.checkpoint.save import save_checkpoint
from gradprune.cli import main
from gradprune.config import PARTS, options_of
from gradprune.demo.model import byte_tokenizer
from gradprune.environment import environment
from gradprune.evaluation import tasks
from gradprune.evaluation.tasks import read_questions
from gradprune.interrupts import Interrupted, interruptible
from gradprune.models import describe
from gradprune.models.masks import GroupMasks
from gradprune.surgery.cut import cut
from gradprune.version import __version__
from helpers.programs import run_program
from helpers.tiny_models import tiny_model

QUICK = ["--num_samples", "8", "--seq_len", "16", "--batch_size", "4"]


def only_line(err: str) -> str:
    """The only line on standard error, except for the names of stages, which are shown if it is not a terminal."""
    (line,) = [line for line in err.splitlines() if line.startswith("error") or not line.endswith(" ...")]
    return line


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
    """A function that runs the command in an empty folder and returns exit code, standard output and error."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradprune", *map(str, arguments)])
        capsys.readouterr()  # discard what the fixtures printed
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


@pytest.mark.parametrize("ratios", ["0.2", "0.1,0.2"])
def test_quiet_keeps_warnings_and_nothing_else(gradprune, model_folder: Path, ids_file: Path, ratios: str) -> None:
    text = ["--dataset", ids_file, "--eval_dataset", ids_file]
    arguments = ["prune", "--base_model", model_folder, *text, "--pruning_ratio", ratios, *QUICK]
    code, out, err = gradprune("--quiet", *arguments, "--output_name", "x")
    assert (code, out) == (0, "")
    assert err.count("evaluation text occurs") == len(ratios.split(","))
    assert all(line.startswith("Warning") for line in err.splitlines())
    code, out, err = gradprune(*arguments, "--output_name", "y")
    assert "evaluation text occurs" in out
    assert "evaluation text occurs" not in err


def test_the_default_output_name_has_the_model_the_method_and_the_ratio(
    gradprune, model_folder: Path, ids_file: Path
) -> None:
    assert gradprune("prune", "--base_model", model_folder, "--dataset", ids_file, *QUICK)[0] == 0
    assert [path.name for path in Path("results").iterdir()] == ["tiny-obs-0.2"]


def test_a_model_in_a_results_folder_is_called_by_the_folder_s_name(
    gradprune, model_folder: Path, ids_file: Path
) -> None:
    options = ["--dataset", ids_file, "--pruning_ratio", "0.1", *QUICK]
    assert gradprune("prune", "--base_model", model_folder, "--output_name", "once", *options)[0] == 0
    code, _, err = gradprune("prune", "--base_model", "results/once/model", *options)
    assert code == 0, err
    (folder,) = Path("results").glob("once-*")
    assert folder.name == "once-obs-0.1"
    assert (folder / "model" / "README.md").read_text().split("---\n")[2].startswith("\n# once pruned by ")
    assert "<title>gradprune: once pruned by " in (folder / "report.html").read_text()


def test_a_model_of_several_ratios_is_called_by_the_folder_and_its_ratio(gradprune, model_folder: Path) -> None:
    several = Path("results/base/0.1/model")
    shutil.copytree(model_folder, several)
    assert model_name(several) == "0.1", "any folder may be called so"
    Path("results/base/report.html").touch()
    assert model_name(several) == "base-0.1"


def test_the_default_output_name_has_the_target(gradprune, model_folder: Path, ids_file: Path) -> None:
    target = ("--target_parameters", "60.5K")
    assert gradprune("prune", "--base_model", model_folder, "--dataset", ids_file, *target, *QUICK)[0] == 0
    name = "results/tiny-obs-parameters-60.5K"
    assert json.loads(Path(name, "analysis/summary.json").read_text())["parameters"]["after"] <= 60_500
    # The recorded options repeat the run.
    assert gradprune("prune", "--config", f"{name}/run.json", "--output_name", "again")[0] == 0
    assert (
        Path("results/again/model/model.safetensors").read_bytes() == Path(name, "model/model.safetensors").read_bytes()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target_parameters", "10K", "--target_bytes", "1KB"], "target_bytes: target_parameters is given too"),
        (["--target_bytes", "4GiB"], "target_bytes: '4GiB' is no less than this model's"),
        (
            ["--target_parameters", "10K", "--pruning_ratio", "0.1,0.2"],
            "pruning_ratio: several are given, and target_parameters too",
        ),
        (["--pruning_ratio", "1.5"], "pruning_ratio: 1.5 is not between 0 and 1"),
        (["--pruning_ratio", "much"], "pruning_ratio: 'much' is not a number"),
        (["--pruning_ratio", "0.95"], "pruning_ratio: 0.95 cannot be reached"),
        (["--importance_method", "best"], "'best' is not one of"),
        (["--no_such_option"], "No such option"),
        (["--seq_len", "65"], "seq_len: 65 is longer than the model's context of 64"),
        (["--num_samples", "4000"], "num_samples: 4000 samples"),
        (["--device", "abacus"], "device: 'abacus' does not work here"),
        (["--backend", "cuda"], "'cuda' is not one of 'auto', 'reference', 'cpp', 'triton'"),
        (["--num_samples", "1.5"], "Invalid value for '--num-samples'"),
        (["--pruning_ratio", "0.2,1.5"], "pruning_ratio: 1.5 is not between 0 and 1"),
        (["--base_model", ""], "base_model: '' is empty; give a model folder or hub id"),
        (["--output_name", ""], "output_name: '' is not a plain folder name"),
        (["--output_name", "--overwrite"], "output_name: '--overwrite' looks like an option"),
        (["--device", "mps"], "device: 'mps' does not work here"),
        (["--evidence_file", "nowhere.safetensors"], "there is no file 'nowhere.safetensors'"),
        (["--gradient_fix", "normalize", "--fix_gradient_vanishing"], "fix_gradient_vanishing: means gradient_fix"),
        (["--dataset", "no-such-file.txt"], "there is no file 'no-such-file.txt'"),
        (["--dataset", "text.pdf"], "dataset: 'text.pdf'"),
        (["--base_model", "./nowhere"], "base_model: "),
    ],
)
def test_a_bad_argument_gives_a_one_line_error_and_exit_code_2(
    gradprune, model_folder: Path, ids_file: Path, arguments: list[str], message: str
) -> None:
    given = ["--base_model", model_folder, "--dataset", ids_file, *QUICK]
    code, out, err = gradprune("prune", *given, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert only_line(err).startswith("error: ")
    assert not Path("results").exists()


def test_an_error_message_about_a_device_is_short(gradprune, model_folder: Path) -> None:
    _, _, err = gradprune("eval", "--model", model_folder, "--device", "mps")
    assert len(only_line(err)) < 300


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is always full")
def test_a_full_standard_output_gives_a_one_line_error(gradprune, monkeypatch: pytest.MonkeyPatch) -> None:
    # It is never closed, because closing it would try to write the rest again.
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1, closefd=False)
    monkeypatch.setattr(sys, "stdout", full)
    code, _, err = gradprune("info", "--json")
    monkeypatch.undo()
    assert code == 2
    assert only_line(err) == "error: standard output: No space left on device"


def in_shell(script: str, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a shell script in which "$@" runs `gradprune arguments` with buffered output."""
    program = [sys.executable, "-c", "from gradprune.cli import main; main()", *arguments]
    done = run_program(["sh", "-c", script, "sh", *program], environment={"PYTHONUNBUFFERED": ""})
    return done.returncode, done.stderr.strip()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is always full")
def test_a_full_output_that_is_noticed_at_the_end_is_reported() -> None:
    assert in_shell('"$@" > /dev/full', "--version") == (2, "error: standard output: No space left on device")
    assert in_shell('"$@" 2> /dev/full', "--nonsense") == (2, "")


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("info",)])
def test_a_closed_pipe_ends_the_command_with_the_exit_code_of_sigpipe(arguments: tuple[str, ...]) -> None:
    # The pipe is closed before anything is written.
    assert in_shell('{ sleep 0.1; "$@"; echo $? >&2; } | true', *arguments) == (0, str(128 + signal.SIGPIPE))


def test_a_system_error_without_a_file_is_not_blamed_on_standard_output(
    gradprune, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("gradprune.environment.environment", fail)
    code, _, err = gradprune("info", "--json")
    assert code == 2
    assert only_line(err) == "error: Input/output error"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("prune --base_model nowhere --dataset no.txt", "dataset: there is no file 'no.txt'"),
        ("prune --base_model nowhere --eval_dataset a.pdf", "eval_dataset: 'a.pdf' is unknown"),
        ("diagnose --base_model nowhere --dataset wikitext2,no.npy", "dataset: there is no file 'no.npy'"),
        ("eval --model nowhere --dataset no.txt", "dataset: there is no file 'no.txt'"),
        ("eval --model nowhere --protocol foo", "protocol: 'foo' is unknown"),
        ("recover --model nowhere --loss lm --dataset no.txt", "dataset: there is no file 'no.txt'"),
        ("recover --model nowhere", "teacher: loss 'kd' learns from the dense model"),
    ],
)
def test_errors_that_need_no_model_are_reported_before_it_is_loaded(gradprune, command: str, message: str) -> None:
    code, _, err = gradprune(*command.split())
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("command", "value"),
    [
        ("plan --ranks 1", "1"),
        ("plan --ranks x", "'x'"),
        ("prune --num_samples 1.5", "'1.5'"),
        ("prune --importance_method group_fisher,obs", "'group_fisher,obs'"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(gradprune, command: str, value: str) -> None:
    code, _, err = gradprune(*command.split())
    assert code == 2
    assert value in only_line(err)
    assert "Value error" not in err


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("plan --config no.yaml", "config: 'no.yaml' cannot be read as YAML: No such file or directory"),
        ("prune --tasks no.jsonl", "tasks: 'no.jsonl' cannot be read: No such file or directory"),
        ("prune --prompts no.txt", "prompts: 'no.txt' cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_reported_in_words(
    gradprune, model_folder: Path, command: str, line: str
) -> None:
    _, _, err = gradprune(*command.split(), "--base_model", model_folder, "--seq_len", "16")
    assert only_line(err) == f"error: {line}"


@pytest.mark.parametrize("command", ["prune", "diagnose"])
def test_a_model_with_nothing_left_is_refused(gradprune, tmp_path: Path, ids_file: Path, command: str) -> None:
    model = tiny_model(channels=24, vocab=300)
    empty = {block.key: torch.zeros(block.groups, dtype=torch.bool) for block in describe(model).blocks}
    save_checkpoint(cut(model, GroupMasks(empty, 3)), byte_tokenizer(), tmp_path / "empty")
    code, _, err = gradprune(command, "--base_model", tmp_path / "empty", "--dataset", ids_file, "--seq_len", "16")
    assert code == 2
    assert "has no KV group and no MLP channel left to prune" in only_line(err)


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
    assert only_line(err).startswith("error: base_model: ")


def test_an_unsupported_architecture_is_refused_by_name(gradprune, model_folder: Path, ids_file: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "model_type": "ctrl", "architectures": None}))
    code, _, err = gradprune("prune", "--base_model", model_folder, "--dataset", ids_file, *QUICK)
    assert code == 2
    assert "architecture 'ctrl'" in err
    assert "the self-test refused it" in err
    assert "llama, llava, ministral, mistral" in err


def test_a_nan_weight_is_named(gradprune, tmp_path: Path, ids_file: Path) -> None:
    model = tiny_model(channels=24)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    save_checkpoint(model, None, tmp_path / "nan")
    code, _, err = gradprune("prune", "--base_model", tmp_path / "nan", "--dataset", ids_file, *QUICK)
    assert code == 2
    assert only_line(err).startswith("error: loss of calibration sample 0 is nan, first in the output of layer 1")
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
    assert list(found["backends"]["cpu"]) == ["reference", "cpp", "triton"]
    assert found["gradient_backends"]["cpu"]["reference"] is None
    assert list(found["gradient_backends"]["cpu"]) == ["reference", "cpp", "cuda"]
    assert "the CUDA kernels work on CUDA tensors" in found["gradient_backends"]["cpu"]["cuda"]
    assert found["versions"]["torch"]
    assert gradprune("info")[0] == 0


def test_help_fits_80_columns(gradprune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in (
        [],
        ["prune"],
        ["search"],
        ["demo"],
        ["diagnose"],
        ["eval"],
        ["export"],
        ["recover"],
        ["plan"],
        ["push"],
        ["info"],
    ):
        code, out, _ = gradprune(*command, "--help")
        assert code == 0
        assert max(map(len, out.splitlines())) <= 80
        assert not any(line.endswith("...") for line in out.splitlines()[1:]), "nothing is cut off"


def test_help_groups_the_options_by_stage_and_leaves_none_out(gradprune) -> None:
    _, out, _ = gradprune("prune", "--help")
    sections = dict(re.findall(r"^(\w[^\n]*):\n((?:  .*\n)+)", out, flags=re.MULTILINE))
    for part in PARTS:
        known = options_of(part)
        section = sections[next(iter(known.values())).stage]
        for name, option in known.items():
            assert (f"  --{name.replace('_', '-')} " in section) is not option.library_only, name


def test_help_says_what_each_command_overwrites(gradprune) -> None:
    for command, what in (("prune", "results folder"), ("recover", "results folder"), ("export", "GGUF file")):
        help = " ".join(gradprune(command, "--help")[1].split())
        assert f"--overwrite / --no-overwrite Replace an existing {what}." in help


def test_a_single_thread_is_written_in_the_singular() -> None:
    torch.set_num_threads(1)
    assert environment()["devices"]["cpu"].endswith(", 1 thread")


def test_without_arguments_the_command_shows_its_help(gradprune) -> None:
    code, out, err = gradprune()
    assert (code, err) == (0, "")
    assert out == gradprune("--help")[1]


def test_the_version_is_shown(gradprune) -> None:
    assert gradprune("--version") == (0, f"gradprune {__version__}\n", "")


def test_evidence_of_an_earlier_run_gives_the_same_groups(gradprune, model_folder: Path, ids_file: Path) -> None:
    given = ["--base_model", model_folder, "--dataset", ids_file, "--no_measure_speed", "--repair", "none", *QUICK]
    assert gradprune("prune", *given, "--output_name", "first")[0] == 0
    (found,) = Path("results/first/analysis").glob("*.safetensors")
    assert gradprune("prune", *given, f"--evidence_file={found}", "--output_name", "second")[0] == 0
    config = json.loads(Path("results/second/run.json").read_text())["config"]
    assert config["evidence_file"] == str(found)
    groups = [Path(f"results/{name}/analysis/groups.csv").read_bytes() for name in ("first", "second")]
    assert groups[0] == groups[1]


def test_the_model_is_cut_in_place_if_speed_is_not_measured(gradprune, model_folder: Path, ids_file: Path) -> None:
    given = ["--base_model", model_folder, "--dataset", ids_file, "--output_name", "x", "--overwrite", *QUICK]
    for extra, in_place in ((["--no_measure_speed"], True), ([], False)):
        assert gradprune("prune", *given, *extra)[0] == 0
        assert json.loads(Path("results/x/run.json").read_text())["config"]["in_place"] is in_place


def test_each_of_several_ratios_has_its_own_folder(gradprune, model_folder: Path, ids_file: Path) -> None:
    code, _, _ = gradprune("prune", "--base_model", model_folder, "--dataset", ids_file, *QUICK, "--no_measure_speed",
                           "--pruning_ratio", "0.2,0.1,0.2", "--output_name", "x")  # fmt: skip
    assert code == 0
    assert sorted(path.name for path in Path("results/x").iterdir()) == ["0.1", "0.2", "report.html"]
    assert json.loads(Path("results/x/0.1/run.json").read_text())["config"]["pruning_ratio"] == 0.1


@pytest.fixture
def questions_file(tmp_path: Path) -> Path:
    path = tmp_path / "quiz.jsonl"
    lines = [{"context": f"{n} and", "choices": ["one", "another one"], "answer": n % 2} for n in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_tasks_are_measured_on_the_dense_and_the_pruned_model(
    gradprune, model_folder: Path, ids_file: Path, questions_file
) -> None:
    asked = ["--tasks", questions_file, "--task_questions", "4", "--dataset", ids_file]
    code, out, err = gradprune("prune", "--base_model", model_folder, "--output_name", "x", *QUICK, *asked)
    assert code == 0, err
    assert "quiz accuracy per byte" in out
    (task,) = json.loads(Path("results/x/analysis/summary.json").read_text())["tasks"]
    assert (task["task"], task["questions"]) == ("quiz", 4)
    assert "quiz accuracy" in Path("results/x/report.html").read_text()
    for model, side in ((model_folder, "before"), ("results/x/model", "after")):
        code, out, _ = gradprune("eval", "--model", model, *asked, "--seq_len", "16", "--json")
        assert code == 0
        assert json.loads(out)["tasks"] == [task[side]]
    code, out, _ = gradprune("eval", "--model", model_folder, *asked, "--seq_len", "16")
    assert "quiz: accuracy " in out


@pytest.mark.parametrize("command", [("prune", *QUICK, "--base_model"), ("eval", "--seq_len", "16", "--model")])
def test_files_of_questions_are_read_once(
    command, gradprune, model_folder: Path, ids_file: Path, questions_file, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(tasks, "read_questions", lambda path: read.append(path) or read_questions(path))
    code, _, err = gradprune(*command, model_folder, "--dataset", ids_file, "--tasks", questions_file)
    assert code == 0, err
    assert read == [str(questions_file)]


def test_missing_files_of_tasks_are_reported_before_calibration(gradprune, model_folder: Path) -> None:
    code, out, err = gradprune("prune", "--base_model", model_folder, *QUICK, "--tasks", "no.jsonl")
    assert (code, out) == (2, "")
    assert "no.jsonl" in err


def test_a_protocol_fixes_the_length_of_windows_but_not_their_number(
    gradprune, model_folder: Path, ids_file: Path
) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 128}))
    measured = ["eval", "--model", model_folder, "--protocol", "wikitext2-128", "--dataset", ids_file]
    code, out, err = gradprune(*measured, "--seq_len", "64")
    assert (code, out) == (2, "")
    assert err == (
        "error: seq_len: 64 is given, but protocol 'wikitext2-128' uses windows of 128 tokens; "
        "leave out one or the other\n"
    )
    for given, windows in (([], 23), (["--seq_len", "128", "--eval_samples", "3"], 3), (["--eval_samples", "99"], 23)):
        code, out, err = gradprune(*measured, *given, "--json")
        assert code == 0, err
        assert json.loads(out)["tokens"] == windows * 127


def test_an_unknown_protocol_is_refused_with_the_known_names(gradprune, model_folder: Path) -> None:
    code, _, err = gradprune("eval", "--model", model_folder, "--protocol", "wikitext2-512")
    assert code == 2
    assert "wikitext2-128, wikitext2-2048" in err


def test_recover_writes_a_checkpoint(gradprune, model_folder: Path, ids_file: Path) -> None:
    code, _, err = gradprune("prune", "--base_model", model_folder, "--dataset", ids_file, "--output_name", "x", *QUICK)
    assert code == 0, err
    options = [
        "--dataset",
        ids_file,
        "--eval_dataset",
        ids_file,
        "--method",
        "full",
        "--steps",
        "3",
        "--seq_len",
        "16",
        "--eval_samples",
        "3",
        "--output_name",
        "y",
    ]
    recover = ["recover", "--model", "results/x/model", *options]
    code, _, err = gradprune(*recover)
    assert (code, "teacher" in err) == (2, True)
    code, out, err = gradprune(*recover, "--teacher", model_folder)
    assert code == 0, err
    summary = json.loads(Path("results/y/analysis/summary.json").read_text())
    assert f"{summary['perplexity']['before']:.4f} before" in out
    assert summary["steps"] == 3
    assert f"after {summary['best_step']} of 3 steps" in out
    code, out, _ = gradprune(*recover, "--teacher", model_folder, "--steps", "1", "--overwrite")
    assert (code, " of 1 step\n" in out) == (0, True)
    summary = json.loads(Path("results/y/analysis/summary.json").read_text())
    assert sorted(path.name for path in Path("results").iterdir()) == ["x", "y"]
    measured = ["--dataset", ids_file, "--seq_len", "16", "--eval_samples", "3", "--json"]
    code, out, _ = gradprune("eval", "--model", "results/y/model", *measured)
    assert json.loads(out)["perplexity"] == pytest.approx(summary["perplexity"]["after"], rel=1e-6)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *[("prune", option) for option in ("base_model", "dataset", "evidence_file", "tasks", "prompts")],
        *[("recover --model nowhere --loss lm", option) for option in ("model", "teacher", "eval_dataset")],
    ],
)
def test_overwrite_keeps_what_the_command_reads(gradprune, command: str, option: str) -> None:
    (read := Path("results/x/model")).mkdir(parents=True)
    Path("results/x/run.json").touch()
    code, _, err = gradprune(*command.split(), f"--{option}", read, "--output_name", "x", "--overwrite")
    assert (code, err) == (
        2,
        f"error: output_name: 'results/x' holds the {option} '{read}' that this run reads, and would be replaced; "
        "choose another name\n",
    )


def test_export_writes_one_file(gradprune, model_folder: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf library is not installed (pip install gguf)")
    export = ["export", "--model", model_folder, "--output", "tiny.gguf", "--outtype", "q8_0"]
    code, out, err = gradprune(*export)
    assert code == 0, err
    assert out == f"tiny.gguf: {Path('tiny.gguf').stat().st_size:,} bytes\n"
    code, _, err = gradprune(*export)
    assert (code, "exists" in err) == (2, True)
    assert gradprune(*export, "--overwrite")[0] == 0
    code, _, err = gradprune(*export[:-1], "q2_k", "--overwrite")
    assert (code, "f32, f16, bf16, q8_0" in err) == (2, True)
    code, _, err = gradprune("export", "--format", "onnx")
    assert (code, "'onnx'" in err) == (2, True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--output", "/proc/x.gguf"), "output: '/proc/x.gguf' cannot be written: No such file or directory"),
        (("--outtype", "q2_k"), "outtype: 'q2_k' is unknown"),
    ],
)
def test_what_export_cannot_write_is_reported_before_the_model_is_loaded(gradprune, given, message: str) -> None:
    code, out, err = gradprune("export", "--model", "nowhere", *given)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert not list(Path().iterdir())


def test_export_keeps_the_files_of_the_model_that_it_reads(gradprune, model_folder: Path) -> None:
    weights = model_folder / "model.safetensors"
    before = weights.read_bytes()
    code, _, err = gradprune("export", "--model", model_folder, "--output", weights, "--overwrite")
    # No stage is named, so the model has not been loaded.
    assert (code, err) == (
        2,
        f"error: output: '{weights}' exists, is no GGUF file, and is never overwritten; choose another name\n",
    )
    assert weights.read_bytes() == before


def test_errors_of_eval_name_its_own_option_for_the_model(gradprune) -> None:
    code, _, err = gradprune("eval", "--model", "")
    assert code == 2
    assert err.startswith("error: model: '' is empty")


def test_search_prints_a_prune_command_that_works(gradprune, model_folder: Path, ids_file: Path) -> None:
    code, out, _ = gradprune("search", "--base_model", model_folder, "--dataset", ids_file, *QUICK, "--repair", "none",
                             "--held_out_samples", "2", "--no_measure_speed", "--output_name", "s")  # fmt: skip
    assert code == 0
    words = shlex.split(next(line for line in out.splitlines() if line.startswith("Chosen: ")))[2:]
    assert words[0] == "prune"
    assert gradprune(*words, "--overwrite")[0] == 0


def names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


def test_a_terminated_run_leaves_nothing(tmp_path: Path, model_folder: Path, ids_file: Path) -> None:
    command = [
        sys.executable, "-c", "from gradprune.cli import main; main()",
        "prune", "--base_model", str(model_folder), "--dataset", str(ids_file), "--output_name", "x",
        "--output_dir", str(tmp_path / "results"), *QUICK, "--num_samples", "180", "--batch_size", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    # The hidden folder that becomes the results folder exists for a moment when the command checks that it can write
    # there, and while the results are written. A glob would raise if the folder were removed while it is listed.
    while process.poll() is None and time.monotonic() < deadline:
        if fnmatch.filter(names(tmp_path / "results"), ".x.partial*"):
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=60)
    finally:
        process.kill()
    left = [name for name in names(tmp_path / "results") if not name.startswith(".")]
    # Either the run was stopped half way and removed its folder, or it had just finished.
    assert left in ([], ["x"])
    assert not list(tmp_path.glob("results/.x*"))


def test_a_signal_during_startup_shows_no_traceback() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "gradprune", "info"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.endswith(" gradprune.errors\n"):  # one of the first modules to be imported
                process.send_signal(signal.SIGINT)
                break
        _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)


def test_a_signal_hidden_by_another_error_is_still_reported() -> None:
    # Some libraries' imports swallow every exception, and then fail because something was not imported.
    with pytest.raises(Interrupted) as error, interruptible():  # noqa: PT012
        with suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        raise ImportError
    assert error.value.name == "SIGTERM"


def test_a_swallowed_signal_is_reported_at_the_end_and_the_next_one_is_obeyed() -> None:
    with pytest.raises(Interrupted) as error, interruptible(), suppress(BaseException):
        signal.raise_signal(signal.SIGTERM)
    assert error.value.name == "SIGTERM"
    with pytest.raises(Interrupted) as error, interruptible():  # noqa: PT012
        with suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal was not heard")
    assert error.value.name == "SIGINT"


def test_further_signals_do_not_disturb_the_cleanup() -> None:
    unwound = []
    with pytest.raises(Interrupted) as error, interruptible(), ExitStack() as stack:  # noqa: PT012
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(unwound.append, number)
            stack.callback(signal.raise_signal, number)
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as interrupt:
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError from interrupt
    assert error.value.name == "SIGTERM"
    assert unwound == [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("blocked", ["triton", "gradprune._C"])
def test_the_package_can_be_imported_without(blocked: str) -> None:
    code = (
        f"import sys; sys.modules[{blocked!r}] = None\n"
        "import gradprune, gradprune.cli, gradprune.config\n"
        "assert 'torch' not in sys.modules, 'import gradprune is not light'\n"
        "from gradprune import ImportanceEngine, prune, load_pruned\n"
    )
    done = run_program([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
