"""The command under faults: earlier results are untouched or new ones are complete, and nothing else is left."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradprune.calibration.evidence import Evidence
from gradprune.checkpoint.load import load_model
from gradprune.checkpoint.save import save_checkpoint
from gradprune.demo.model import byte_tokenizer
from gradprune.recovery.recover import _Trainer
from helpers.commands import QUICK, at_stage, run, signalled, start
from helpers.tiny_models import tiny_model

STAGES = (
    "loading the model",
    "calibration",
    "importance",
    "priors",
    "perplexity_before",
    "selection",
    "repair",
    "surgery",
    "perplexity_after",
    "writing",
)
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}


@pytest.fixture(scope="module")
def given_files(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Options that name a tiny model and a text, and keep the run short."""
    folder = tmp_path_factory.mktemp("given")
    save_checkpoint(tiny_model(channels=24, vocab=300, dtype=torch.float32), byte_tokenizer(), folder / "tiny")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(3, 61, 3000))
    return ["--base_model", folder / "tiny", "--dataset", folder / "ids.npy", *QUICK]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def old_results(work: Path) -> Path:
    """Make a results folder as an earlier run would have, and return it."""
    folder = work / "results" / "x"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("old")
    return folder


def assert_whole(folder: Path) -> None:
    """Check that the folder holds complete results, with a model that loads."""
    assert names(folder) == ["analysis", "gradient_analysis", "model", "report.html", "run.json"]
    json.loads((folder / "run.json").read_text())
    load_model(folder / "model")


@pytest.mark.parametrize(
    ("number", "stage"),
    [
        *((signal.SIGTERM, stage) for stage in STAGES),
        *((number, stage) for number in (signal.SIGINT, signal.SIGHUP) for stage in ("calibration", "writing")),
        *((signal.SIGKILL, stage) for stage in ("loading the model", "calibration", "repair", "writing")),
    ],
)
def test_a_signal_at_any_stage_leaves_the_old_results_and_nothing_else(
    work: Path, given_files: list[object], number: signal.Signals, stage: str
) -> None:
    old = old_results(work)
    # The temperature turns H-GSP on, because without it there is no stage for priors.
    arguments = ("prune", *given_files, "--output_name", "x", "--overwrite", "--temperature", "1")
    code, err = run(work, *arguments, prepare=at_stage(stage, signalled(number)))
    assert code == SIGNALS[number], err
    assert "Traceback" not in err
    assert (old / "run.json").read_text() == "old"
    if number != signal.SIGKILL:
        assert names(work / "results") == ["x"]
        assert f"stopped by {number.name}" in err.splitlines()[-1]
        return
    assert ".x.lock" in names(work / "results")


def test_after_a_kill_the_next_run_cleans_up_and_says_so(work: Path, given_files: list[object]) -> None:
    arguments = ("prune", *given_files, "--output_name", "x")

    def killed_in_writing() -> None:
        import gradprune.report.folder as folder

        pytest.MonkeyPatch().setattr(folder, "write_report", lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    assert run(work, *arguments, prepare=killed_in_writing)[0] == -9
    left = names(work / "results")
    assert len(left) == 2, left
    assert left[1].startswith(".x.partial-")
    code, err = run(work, *arguments)
    assert code == 0, err
    assert "was killed; its unfinished files have been removed (1 folder)" in err
    assert names(work / "results") == ["x"]
    assert_whole(work / "results" / "x")


def test_a_run_that_is_killed_before_it_writes_leaves_nothing_to_remove(work: Path, given_files: list[object]) -> None:
    arguments = ("prune", *given_files, "--output_name", "x")
    assert run(work, *arguments, prepare=at_stage("calibration", signalled(signal.SIGKILL)))[0] == -9
    code, err = run(work, *arguments)
    assert code == 0, err
    assert "of 'results/x' was killed; it left nothing to remove" in err


def test_a_signal_after_a_calibration_was_saved_says_how_to_resume_it(work: Path, given_files: list[object]) -> None:
    for every, stage in (
        ((), "repair"),
        (("--checkpoint_every", "4"), "loading the model"),
        (("--checkpoint_every", "4"), "repair"),
    ):
        arguments = ("prune", *given_files, "--output_name", "x", *every)
        code, err = run(work, *arguments, prepare=at_stage(stage, signalled(signal.SIGTERM)))
        assert code == 143, err
        advised = err.splitlines()[-1].endswith("; repeat the command with --resume to continue its calibration")
        assert advised == (bool(every) and stage == "repair")
    code, err = run(work, *arguments, "--resume")
    assert code == 0, err
    assert "calibration goes on after 8 of 8 samples" in err


def test_a_signal_during_recovery_says_that_the_same_command_continues_it(
    work: Path, given_files: list[object]
) -> None:
    def at_step(number: int) -> Callable[[], None]:
        def prepare() -> None:
            step = _Trainer._step

            def disturbed(self: _Trainer) -> None:
                if self.progress.step == number:
                    os.kill(os.getpid(), signal.SIGTERM)
                step(self)

            pytest.MonkeyPatch().setattr(_Trainer, "_step", disturbed)

        return prepare

    arguments = ("recover", "--model", given_files[1], *given_files[2:4], "--output_name", "x", "--loss", "lm")
    arguments = (*arguments, "--steps", "4", "--seq_len", "16")
    for step in (0, 1):
        code, err = run(work, *arguments, prepare=at_step(step))
        assert code == 143, err
        assert err.splitlines()[-1].endswith("; repeat the command to continue from its last check") == (step == 1)
    code, err = run(work, *arguments)
    assert code == 0, err
    assert names(work / "results") == ["x"]


def test_a_signal_that_is_ignored_stays_ignored(work: Path, given_files: list[object]) -> None:
    def as_under_nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        at_stage("repair", signalled(signal.SIGHUP))()

    code, err = run(work, "prune", *given_files, "--output_name", "x", prepare=as_under_nohup)
    assert code == 0, err
    assert_whole(work / "results" / "x")


def test_a_second_run_at_the_same_time_is_refused(work: Path, given_files: list[object]) -> None:
    reading, writing = os.pipe()
    arguments = ("prune", *given_files, "--output_name", "x")
    first = start(work, *arguments, prepare=at_stage("repair", lambda: os.read(reading, 1)))
    while not (work / "results" / ".x.lock").exists():
        pass
    code, err = run(work, *arguments)
    os.write(writing, b"go")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert f"is being written by another run (process {first.pid} on " in err
    code, err = first.wait()
    assert code == 0, err
    assert_whole(work / "results" / "x")
    assert names(work / "results") == ["x"]


def test_a_folder_that_appears_during_the_run_is_left_alone(work: Path, given_files: list[object]) -> None:
    def appear() -> None:
        Path("results/x").mkdir()
        Path("results/x/precious.txt").write_text("years")

    for ratios in ("0.2", "0.1,0.2"):
        arguments = ("prune", *given_files, "--output_name", "x", "--pruning_ratio", ratios)
        code, err = run(work, *arguments, prepare=at_stage("perplexity_before", appear))
        assert code == 2, err
        assert "appeared during the run; the new results are in 'results/x-" in err.splitlines()[-1]
        assert names(work / "results" / "x") == ["precious.txt"]
        (work / "results" / "x" / "precious.txt").unlink()
        (work / "results" / "x").rmdir()
    assert {"x-2", "x-3"} <= set(names(work / "results"))
    assert_whole(work / "results" / "x-2")


@pytest.mark.parametrize("bytes_", [0, 2_000, 40_000])
def test_a_full_disk_gives_a_one_line_error_and_keeps_the_evidence_if_it_fits(
    work: Path, given_files: list[object], bytes_: int
) -> None:
    old = old_results(work)

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    arguments = ("prune", *given_files, "--output_name", "x", "--overwrite")
    code, err = run(work, *arguments, prepare=at_stage("writing", full))
    assert code == 2, err
    assert err.splitlines()[-1].startswith("error: output_name: ")
    assert "Traceback" not in err
    assert (old / "run.json").read_text() == "old"
    kept = "x.evidence.safetensors"
    assert names(work / "results") == (["x", kept] if bytes_ == 40_000 else ["x"])
    if bytes_ == 40_000:
        assert f"--evidence_file 'results/{kept}'" in err
        arguments = ("--output_name", "y", "--evidence_file", f"results/{kept}")
        code, err = run(work, "prune", *given_files, *arguments)
        assert code == 0, err


def test_a_full_disk_for_changed_weights_gives_a_one_line_error_and_keeps_the_evidence(
    work: Path, given_files: list[object]
) -> None:
    def full() -> None:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))

        # The evidence is written as if to another disk, which is not full.
        def room(self: Evidence, path: Path) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            save(self, path)

        save = Evidence.save
        pytest.MonkeyPatch().setattr(Evidence, "save", room)

    arguments = ("prune", *given_files, "--output_name", "x", "--stream_layers", "on")
    code, err = run(work, *arguments, prepare=at_stage("repair", full))
    assert code == 2, err
    assert err.splitlines()[-1].startswith("error: stream_layers: changed weights cannot be written to ")
    assert "--evidence_file 'results/x.evidence.safetensors'" in err


def test_a_killed_streamed_run_leaves_no_weights_among_the_temporary_files(
    work: Path, given_files: list[object]
) -> None:
    def prepare() -> None:
        pytest.MonkeyPatch().setattr("tempfile.tempdir", str(work))
        at_stage("perplexity_after", signalled(signal.SIGKILL))()

    arguments = ("prune", *given_files, "--output_name", "x", "--stream_layers", "on")
    code, err = run(work, *arguments, prepare=prepare)
    assert code == -9, err
    folders = list(work.glob("gradprune-*"))
    assert len(folders) == 1
    assert not list(folders[0].iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a read-only place that nobody can write to")
@pytest.mark.parametrize("place", ["/proc", "/proc/x", "file", "file/below", "n" * 250])
def test_an_unwritable_place_gives_a_one_line_error_before_anything_is_loaded(
    work: Path, given_files: list[object], place: str
) -> None:
    (work / "file").touch()
    where = ("--output_name", place) if place.startswith("n") else ("--output_name", "x", "--output_dir", place)
    code, err = run(work, "prune", "--base_model", "./nowhere", *where)
    assert code == 2
    assert err.startswith("error: output_name: ")
    assert len(err.splitlines()) == 1
    assert names(work) == ["file"]


def test_what_the_run_reads_is_not_overwritten(work: Path, given_files: list[object]) -> None:
    code, err = run(work, "prune", *given_files, "--output_name", "x")
    assert code == 0, err
    again = ("--base_model", "results/x/model", *given_files[2:], "--output_name", "x", "--overwrite")
    code, err = run(work, "prune", *again)
    assert code == 2
    assert "holds the base_model 'results/x/model' that this run reads" in err
    assert_whole(work / "results" / "x")
    (work / "mine").mkdir()
    (work / "mine" / "thesis.tex").touch()
    code, err = run(work, "prune", *given_files, "--output_dir", ".", "--output_name", "mine", "--overwrite")
    assert code == 2
    assert "is never overwritten" in err
    assert names(work / "mine") == ["thesis.tex"]


@pytest.mark.parametrize("name", ["a[/b]", "[bold red]x", "a:bomb:b", "m模", "with space"])
def test_names_are_printed_as_they_are(work: Path, given_files: list[object], name: str) -> None:
    arguments = ("prune", *given_files, "--output_dir", name.replace("/", "-"), "--output_name", name.replace("/", "-"))
    code, err = run(work, *arguments)
    assert code == 0, err
    plain = name.replace("/", "-")
    assert f"{plain}/{plain}/model" in err


def test_quiet_and_verbose(work: Path, given_files: list[object]) -> None:
    # With equal widths there is nothing to warn about.
    code, err = run(work, "prune", *given_files, "--output_name", "x", "--quiet", "--uniform")
    assert (code, err) == (0, "")
    code, err = run(work, "--verbose", "prune", *given_files, "--output_name", "y")
    assert code == 0
    assert "info: Calibration took" in err
    code, err = run(work, "prune", *given_files, "--output_name", "z")
    assert [line for line in err.splitlines() if line.endswith(" ...")][:5] == [
        "Loading the model ...",
        "Calibration ...",
        "Importance ...",
        "Perplexity before ...",
        "Generations ...",
    ]
    assert "priors" not in json.loads((work / "results" / "z" / "run.json").read_text())["seconds"]


def test_the_same_text_twice_is_not_called_held_out(work: Path, given_files: list[object]) -> None:
    code, err = run(work, "prune", *given_files, "--eval_dataset", given_files[3], "--output_name", "x")
    assert code == 0, err
    assert "Warning: 100% of the evaluation text occurs in the calibration text" in err
    report = (work / "results" / "x" / "report.html").read_text()
    assert "held-out tokens" not in report
    code, err = run(work, "prune", *given_files, "--output_name", "y")
    assert "occurs in the calibration text" not in err
    assert "held-out tokens" in (work / "results" / "y" / "report.html").read_text()


def test_ratios_whose_folders_have_the_same_name_are_refused(work: Path, given_files: list[object]) -> None:
    code, err = run(work, "prune", *given_files, "--pruning_ratio", "0.1,0.10000001", "--output_name", "x")
    assert code == 2
    assert "another one are both written to '0.1'" in err
    assert names(work) == []


def test_an_epsilon_that_would_drop_every_layer_is_refused(work: Path, given_files: list[object]) -> None:
    code, err = run(work, "prune", *given_files, "--epsilon", "1", "--pruning_ratio", "0.3", "--output_name", "x")
    assert code == 2
    assert "epsilon: 1 would remove every layer" in err
    assert names(work / "results") == ["x.evidence.safetensors"]


def test_options_of_random_values_never_end_in_a_traceback(work: Path, given_files: list[object]) -> None:
    numbers = st.one_of(st.integers(-3, 2**70), st.floats(), st.sampled_from(["", "x", "1e400", "-0", "0.1,"]))
    options = st.sampled_from(
        (
            *("--pruning_ratio", "--epsilon", "--temperature", "--tau", "--num_samples", "--seq_len", "--batch_size"),
            *("--seed", "--round_to", "--max_layer_ratio", "--attention_factor", "--eval_samples"),
        )
    )

    @settings(max_examples=12, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(option=options, value=numbers)
    def check(option: str, value: object) -> None:
        code, err = run(work, "prune", *given_files, f"{option}={value}", "--output_name", "x", "--overwrite")
        assert code in (0, 2), err
        assert "Traceback" not in err
        assert code == 0 or err.splitlines()[-1].startswith("error: "), err

    check()


def test_damaged_evidence_gives_a_one_line_error(work: Path, given_files: list[object]) -> None:
    code, err = run(work, "prune", *given_files, "--output_name", "x")
    assert code == 0, err
    evidence = work / "results" / "x" / "analysis" / "evidence.safetensors"
    whole = evidence.read_bytes()

    @settings(max_examples=12, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(at=st.integers(0, len(whole) - 1), flip=st.integers(1, 255), cut=st.booleans())
    def check(at: int, flip: int, cut: bool) -> None:
        damaged = whole[:at] if cut else whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]
        (work / "damaged.safetensors").write_bytes(damaged)
        options = ("--evidence_file", "damaged.safetensors", "--output_name", "y")
        code, err = run(work, "prune", *given_files, *options)
        assert code == 2, err
        assert err.splitlines()[-1].startswith("error: evidence_file: ")
        assert "Traceback" not in err

    check()


def test_a_damaged_model_gives_a_one_line_error_or_a_whole_measurement(work: Path, given_files: list[object]) -> None:
    whole = Path(str(given_files[1]))
    files = sorted(path.name for path in whole.iterdir())

    @settings(max_examples=30, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        name=st.sampled_from(files),
        how=st.sampled_from(["cut", "flip", "another file's content", "missing", "a folder"]),
        at=st.floats(0.0, 0.999),
        bit=st.integers(0, 7),
    )
    def check(name: str, how: str, at: float, bit: int) -> None:
        shutil.rmtree(work / "m", ignore_errors=True)
        shutil.copytree(whole, work / "m")
        path = work / "m" / name
        content = bytearray(path.read_bytes())
        place = int(at * len(content))
        if how == "cut":
            path.write_bytes(content[:place])
        elif how == "flip":
            content[place] ^= 1 << bit
            path.write_bytes(content)
        elif how == "another file's content":
            path.write_bytes((whole / files[files.index(name) - 1]).read_bytes())
        else:
            path.unlink()
        if how == "a folder":
            path.mkdir()
        code, err = run(work, "eval", "--model", "m", "--dataset", given_files[3], "--seq_len", "16", "--json")
        assert "Traceback" not in err
        if code == 0:
            assert json.loads(err[err.index("{") :])["perplexity"] > 0.0
        else:
            assert code == 2, err
            assert err.splitlines()[-1].startswith("error: "), err

    check()


def assert_same_results(one: Path, other: Path) -> None:
    for file in ("model/model.safetensors", "analysis/groups.csv", "analysis/evidence.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


@pytest.mark.parametrize("options", [(), ("--reduction", "batch", "--gradient_fix", "adaptive", "--temperature", "1")])
def test_a_killed_calibration_is_resumed_to_the_same_bytes(
    work: Path, given_files: list[object], options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = ("--importance_method", "taylor", *options)
    arguments = ("prune", *given_files, "--num_samples", "24", *method)
    code, err = run(work, *arguments, "--output_name", "undisturbed")
    assert code == 0, err
    resumed = (*arguments, "--output_name", "x", "--checkpoint_every", "4", "--resume")
    moments = np.random.default_rng(0).integers(0, 6, 5)  # how many steps each process completes before it is killed
    seen = []
    for moment in moments:
        code, err = run(work, *resumed, prepare=lambda moment=moment: killed_after_steps(int(moment)))
        assert code in (0, -9), err
        seen.append(code)
        if code == 0:
            break
    assert -9 in seen
    if seen[-1] != 0:
        code, err = run(work, *resumed)
        assert code == 0, err
        assert "calibration goes on after" in err
    assert_same_results(work / "results" / "undisturbed", work / "results" / "x")
    assert names(work / "results") == ["undisturbed", "x"]


def test_a_run_killed_after_its_calibration_does_not_repeat_it(work: Path, given_files: list[object]) -> None:
    arguments = ("prune", *given_files, "--output_name")
    assert run(work, *arguments, "undisturbed")[0] == 0
    resumed = (*arguments, "x", "--checkpoint_every", "4", "--resume")
    assert run(work, *resumed, prepare=at_stage("repair", signalled(signal.SIGKILL)))[0] == -9
    code, err = run(work, *resumed)
    assert code == 0, err
    assert "calibration goes on after 8 of 8 samples" in err
    assert_same_results(work / "results" / "undisturbed", work / "results" / "x")


def killed_after_steps(steps: int) -> None:
    """Make the process kill itself in the step that follows this number of steps; for `prepare`."""
    import gradprune.calibration.engine as engine

    run_step, done = engine.ImportanceEngine._run, []

    def step(self, input_ids):
        done.append(1)
        if len(done) > steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return run_step(self, input_ids)

    engine.ImportanceEngine._run = step


def test_only_the_same_calibration_is_resumed(work: Path, given_files: list[object]) -> None:
    kept = work / "results" / ".x.calibration"
    arguments = ("prune", *given_files, "--output_name", "x", "--checkpoint_every", "4")
    assert run(work, *arguments, prepare=lambda: killed_after_steps(1))[0] == -9
    state = kept.read_bytes()
    for options, differs in (
        (("--seed", "1"), "seed (0, now 1), another data"),
        (("--batch_size", "2"), "batch_size (4, now 2)"),
        (("--reduction", "batch"), "reduction (sample, now batch)"),
    ):
        code, err = run(work, *arguments, *options, "--resume")
        assert code == 2
        assert f"another {differs}" in err.splitlines()[-1]
        assert kept.read_bytes() == state
    kept.write_bytes(state[:-9] + b"x" + state[-8:])
    code, err = run(work, *arguments, "--resume")
    assert code == 2
    assert "is damaged" in err.splitlines()[-1]
    kept.write_bytes(state)
    code, err = run(work, *arguments)
    assert code == 0, err
    assert "of an interrupted run is not used; --resume would go on with it" in err
    assert names(work / "results") == ["x"]
