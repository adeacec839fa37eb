"""`make gpu`: which programs it starts, with how much time, and which it leaves out; tested without a GPU."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.jobs import profile, streamed, whole
from benchmarks.processes import run_within
from benchmarks.progress import Deadline
from gradprune.progress import Clock

ROOT = Path(__file__).resolve().parents[2]
TOY = ["--device", "cpu", "--toy"]


class Machine:
    """A stand-in for a machine, whose programs take time but do nothing, and which may lack some modules."""

    def __init__(self, patch: pytest.MonkeyPatch, takes: float = 1e9, absent: tuple[str, ...] = ()) -> None:
        self.now, self.takes = 0.0, takes
        self.started: list[tuple[list[str], float, float]] = []
        self.codes: dict[str, int] = {}
        patch.setattr("benchmarks.progress.time.monotonic", lambda: self.now)
        patch.setattr(gpu, "run_within", self.run)
        patch.setattr(gpu, "missing", lambda names: [name for name in names if name in absent])

    def run(self, command: list[str], seconds: float, environment: dict[str, str], patience: float) -> int | None:
        assert environment["PYTHONPATH"] == str(ROOT)
        # After an interrupt, pytest-xdist takes ten seconds to end; only then does pytest show what failed.
        assert patience > 10.0 or self.what(command) != "pytest"
        self.started.append((command, seconds, patience))
        self.now += min(self.takes, seconds)
        return self.codes.get(self.what(command), 0) if self.takes <= seconds else None

    @staticmethod
    def what(command: list[str]) -> str:
        return command[command.index("-m") + 1]


def test_it_builds_tests_and_measures_within_nine_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    assert gpu.main(["--device", "cpu"]) == 1  # because no program finished
    assert [machine.what(command) for command, *_ in machine.started] == ["pip", "pytest", "benchmarks.run"]
    assert machine.now <= gpu.SECONDS < 540.0
    (_, build, _), (_, tests, _), (measuring, seconds, patience) = machine.started
    assert (build, tests) == (gpu.BUILD, gpu.TESTS)
    assert seconds == pytest.approx(gpu.SECONDS - build - tests)
    # The benchmarks should end by themselves before they are interrupted.
    end = float(measuring[measuring.index("--until") + 1])
    assert gpu.SECONDS - 15.0 < end < gpu.SECONDS - patience


def test_the_gpu_is_measured_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, takes=1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.main([]) == 0
    command, *_ = machine.started[-1]
    assert command[command.index("--device") + 1] == "cuda"


def test_time_that_is_not_used_goes_to_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, takes=20.0)
    assert gpu.main(["--device", "cpu", "--quick"]) == 0
    command, seconds, _ = machine.started[-1]
    assert seconds == pytest.approx(gpu.SECONDS - 40.0)
    assert "--quick" in command
    assert command[command.index("--steps_of") + 1] == "cuda"


def test_a_call_with_little_time_left_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    gpu.main(["--device", "cpu", "--seconds", "100"])
    assert machine.now == pytest.approx(100.0, abs=10.0)


@pytest.mark.parametrize("part", ["pip", "pytest", "benchmarks.run"])
def test_a_failure_is_reported_and_the_rest_runs(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, takes=1.0)
    machine.codes[part] = 3
    assert gpu.main(["--device", "cpu"]) == 1
    assert len(machine.started) == 3


def test_parts_that_lack_a_module_are_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(monkeypatch, takes=1.0, absent=("scikit_build_core", "pytest"))
    assert gpu.main(["--device", "cpu"]) == 0
    assert [machine.what(command) for command, *_ in machine.started] == ["benchmarks.run"]
    said = capsys.readouterr().err
    assert "LEFT OUT: the C++ and CUDA ops, which cannot be built without scikit_build_core" in said
    assert "LEFT OUT: the tests, which cannot run without pytest" in said


@pytest.mark.parametrize("absent", [(), ("xdist",)])
def test_tests_run_in_parallel_if_xdist_is_installed(absent: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, takes=1.0, absent=absent)
    gpu.main(["--device", "cpu"])
    command, *_ = machine.started[1]
    assert ("--numprocesses" in command) is not bool(absent)
    assert command[command.index("pytest") :][1:3] == ["-m", "gpu"]


def test_large_runs_only_the_jobs_of_the_70b_model(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, takes=1.0)
    gpu.main(["--device", "cpu", "--large"])
    assert [machine.what(command) for command, *_ in machine.started] == ["pip", "benchmarks.run"]
    assert "--large" in machine.started[-1][0]


@pytest.mark.parametrize("build", ["is left out", "fails"])
def test_the_kernels_are_found_if_nothing_was_installed(
    build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels' folder is beside the package and is linked into it; programs find both through PYTHONPATH."""
    for folder in ("gradprune", "kernels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    Machine(monkeypatch, takes=1.0, absent=("gradprune.kernels", "pybind11" if build == "is left out" else "none"))
    monkeypatch.setattr(gpu, "run_within", lambda command, *_: int(Machine.what(command) == "pip"))
    assert gpu.main(["--device", "cpu"]) == (1 if build == "fails" else 0)
    program = "import gradprune, gradprune.kernels as k; print(gradprune.__file__, k.__file__)"
    run = subprocess.run(
        [sys.executable, "-S", "-c", program], env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, stdout=subprocess.PIPE,
        text=True, check=True,
    )  # fmt: skip
    assert run.stdout.split() == [str(tmp_path / "gradprune" / name) for name in ("__init__.py", "kernels/__init__.py")]


def test_the_makefiles_commands_run(tmp_path: Path) -> None:
    """With a stand-in for Python that records its arguments."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/started\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), "GPU_OPTIONS": " ".join(TOY)}
    for target in ("gpu", "gpu-70b"):
        subprocess.run(["make", "-e", target], cwd=ROOT, env=environment, check=True, capture_output=True)
    plain, large = (tmp_path / "started").read_text().splitlines()
    assert plain.split() == ["-m", "benchmarks.gpu", "--output", str(tmp_path / "out"), *TOY]
    assert large == f"{plain} --large"


def test_a_program_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    child = f"import time, pathlib; time.sleep(2.5); pathlib.Path({str(tmp_path / 'lived')!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run_within([sys.executable, "-c", parent], 1.0) is None
    time.sleep(2.0)
    assert not (tmp_path / "lived").exists()


def has_ended(process: int) -> bool:
    """Whether a process has ended; if nobody waits for it, it remains as a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_program_in_a_session_of_its_own_ends_with_its_killed_parent(tmp_path: Path) -> None:
    """As in benchmarks, which themselves run programs with a time limit."""
    begun = tmp_path / "begun"
    inner = f"import os, pathlib, time; pathlib.Path({str(begun)!r}).write_text(str(os.getpid())); time.sleep(60.0)"
    outer = (
        "import signal, sys; from benchmarks.processes import run_within; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        f"run_within([sys.executable, '-c', {inner!r}], 60.0)"
    )
    assert run_within([sys.executable, "-c", outer], 8.0, {"PYTHONPATH": str(ROOT)}) is None
    process, end = int(begun.read_text()), time.monotonic() + 10.0
    while not has_ended(process) and time.monotonic() < end:
        time.sleep(0.1)
    assert has_ended(process)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_program_is_interrupted_before_it_is_killed(handler: object, tmp_path: Path) -> None:
    """This lets pytest show what failed so far, even if this process was started with interrupts ignored."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        program = f"trap 'touch {tmp_path / 'interrupted'}; exit' INT; sleep 60"
        assert run_within(["sh", "-c", program], 2.0) is None
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "interrupted").exists()


def test_a_program_that_ends_in_time_has_its_exit_code() -> None:
    program = "import os, sys; sys.exit(int(os.environ['CODE']))"
    assert run_within([sys.executable, "-c", program], 60.0, {"CODE": "7"}) == 7


def test_the_peak_of_each_stage_excludes_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the GPU's allocator."""
    held, most = [100], [100]

    def allocate(count: int) -> None:
        held[0] += count
        most[0] = max(most[0], held[0])

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: most[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: most.__setitem__(0, held[0]))
    clock, ended = Clock(), []
    with whole._stages_measured("cuda", ended.append):
        for name, count in (("calibration", 70), ("repair", 30)):
            with clock.stage(name):
                allocate(count)
                allocate(-count)
    assert [(stage.name, stage.peak) for stage in ended] == [("calibration", 70), ("repair", 30)]
    assert [*clock.seconds] == ["calibration", "repair"]


def test_counters_are_read_before_a_model_takes_time_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    for name in ("_read_counters", "build", "_profile"):
        monkeypatch.setattr(profile, name, lambda *_, name=name: done.append(name))
    profile.main([*TOY, "--output", str(tmp_path)])
    assert done == ["_read_counters", "build", "_profile", "_profile"]


@pytest.mark.parametrize(("code", "reported"), [(0, False), (1, True)])
def test_counters_are_read_if_ncu_is_installed_and_permitted(
    code: int, reported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for Nsight Compute that records its arguments."""
    ncu = tmp_path / "ncu"
    ncu.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/started\nexit {code}\n')
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    # The seconds that are left of the step's share of a call when the step begins.
    profile._read_counters(Namespace(device="cuda", output=tmp_path / "out"), Deadline(18.0))
    started = (tmp_path / "started").read_text()
    assert f"--log-file {tmp_path / 'out' / profile.NCU_FILE} {sys.executable} -c" in started
    assert "--kernel-name regex:^_linear_importance_kernel --section SpeedOfLight" in started
    assert ("LEFT OUT" in capsys.readouterr().err) is reported
    compile(profile._NCU_PROGRAM, "program", "exec")


def test_the_memory_of_the_streamed_jobs_process_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = namedtuple("properties", "total_memory")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties(96 << 30))
    python, flag, program = streamed._program(Namespace(device="cuda", budget=24.0))
    assert (python, flag) == (sys.executable, "-c")
    assert "set_per_process_memory_fraction(0.25)" in program
    # The program is run as the command line, so that its arguments follow.
    without_bound = program.replace("torch.cuda.set_per_process_memory_fraction(0.25)", "")
    run = subprocess.run([python, flag, without_bound, "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("gradprune ")
