"""One provider at work on one model: its scores on a first batch, timed turns, peak memory.

`Session` works in this process, for a GPU, whose memory PyTorch counts by itself and which models share. `Worker` is
one in a process of its own, for the CPU: peak resident memory is a process's, and a peer that hangs can be ended.
"""

import ctypes
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.jobs.calibrators import Calibrator, Outcome, calibrators
from benchmarks.jobs.models import Load, build, samples
from benchmarks.timing import first_line, free, out_of_memory

# Seconds that a worker may take for a turn, its start included.
TIMEOUT = 120.0
# From so many bytes on tensors are mapped one by one, where that is asked for; and mallopt's name for the parameter.
_MAPPED_BYTES, _M_MMAP_THRESHOLD = 64 << 10, -3


@dataclass(frozen=True)
class Task:
    """What a worker is to do: `provider` of `calibrators(backends)` on a random Llama of `size`.

    mapped: every larger tensor is a mapping of its own, so that resident memory is that of tensors. Otherwise the C
        library's heap returns freed ones late, or not at all where others lie above them. Slower: not to be timed.
    """

    provider: str
    backends: tuple[str, ...]
    size: str
    dtype: str
    recompute: bool
    threads: int
    mapped: bool = False


@dataclass(frozen=True)
class Turn:
    """One calibration: its seconds, bytes above the loaded model at the peak, what else the provider tells.

    peak_memory: of tensors on a GPU; resident on the CPU, so with what the heap keeps of freed tensors (see `Task`).
    """

    seconds: float
    peak_memory: int
    parts: dict[str, float]


class TurnError(Exception):
    """A provider could not do its turn: out of memory, a timeout, no such package."""


class Session:
    """A provider in this process."""

    def __init__(self, calibrator: Calibrator, model: PreTrainedModel, recompute: bool) -> None:
        """The model is as it was between turns, but for its implementation of attention."""
        self._calibrator = calibrator
        self._model = model
        self._recompute = recompute
        self._held = _resident_bytes()

    def scores(self, load: Load, _timeout: float = TIMEOUT) -> dict[str, Tensor]:
        """Scores of the load's first batch, which is the warm-up too. In this process nothing can be ended in time.

        Raises:
            TurnError: it cannot.
        """
        return self._run(samples(self._model, load)[:1]).scores

    def turn(self, load: Load, _timeout: float = TIMEOUT) -> Turn:
        """One whole calibration.

        Raises:
            TurnError: it cannot.
        """
        batches = samples(self._model, load)
        cuda = self._model.device.type == "cuda"
        if cuda:
            free("cuda")
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        outcome = self._run(batches)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() - held if cuda else _peak_resident_bytes() - self._held
        return Turn(seconds, max(peak, 0), outcome.seconds)

    def close(self) -> None:
        """Nothing is held."""

    def _run(self, batches: list[Tensor]) -> Outcome:
        self._model.set_attn_implementation(self._calibrator.attention)
        try:
            return self._calibrator.run(self._model, batches, self._recompute)
        except Exception as error:  # what a peer raises is its result, and is recorded
            raise TurnError(
                f"out of memory: {first_line(error)}" if out_of_memory(error) else first_line(error)
            ) from error
        finally:
            self._model.zero_grad(set_to_none=True)


class Worker:
    """A provider in a process of its own; raises `TurnError` for all that goes wrong there."""

    def __init__(self, task: Task) -> None:
        """Start the process and wait for it to have loaded the model: many at once would be in each other's way."""
        # Its server imports the libraries once, before any thread is there, and forks a process a worker.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "torch_pruning"])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(task, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            if self._connection.poll(TIMEOUT):
                self._connection.recv()
            else:
                self._process.kill()
        except (EOFError, OSError):
            # It died; whoever asks it for something is told.
            self._process.join(10.0)

    def scores(self, load: Load, timeout: float = TIMEOUT) -> dict[str, Tensor]:
        """As `Session.scores`."""
        return {name: torch.tensor(values) for name, values in self._ask("scores", load, timeout).items()}

    def turn(self, load: Load, timeout: float = TIMEOUT) -> Turn:
        """As `Session.turn`."""
        found: Turn = self._ask("turn", load, timeout)
        return found

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.terminate()
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, what: str, load: Load, timeout: float) -> Any:
        if not self._process.is_alive():
            raise TurnError(f"its process is gone (exit code {self._process.exitcode})")
        try:
            self._connection.send((what, load))
            if not self._connection.poll(timeout):
                self._process.kill()
                raise TurnError(f"timeout: not done after {timeout:.0f} s")
            kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(10.0)
            raise TurnError(f"its process died (exit code {self._process.exitcode})") from error
        if kind == "error":
            raise TurnError(value)
        return value


def serve(task: Task, connection: Connection) -> None:
    """A worker's process: answer ("scores" | "turn", load) until the other end closes."""
    torch.set_num_threads(task.threads)
    if task.mapped:
        _map_tensors()
    calibrator = next(one for one in calibrators(task.backends) if one.name == task.provider)
    failure = _warm_libraries(calibrator)
    session = Session(calibrator, build(task.size, dtype=task.dtype), task.recompute)
    answers: dict[str, Callable[[Load], Any]] = {
        # As lists, because tensors would travel through shared memory.
        "scores": lambda load: {name: values.tolist() for name, values in session.scores(load).items()},
        "turn": session.turn,
    }
    connection.send("ready")
    while True:
        try:
            what, load = connection.recv()
        except EOFError:
            return
        try:
            if failure is not None:
                raise TurnError(failure)
            _reset_peak()
            connection.send(("done", answers[what](load)))
        except TurnError as error:
            connection.send(("error", str(error)))


def _warm_libraries(calibrator: Calibrator) -> str | None:
    """Load what the provider's first run would load, so that libraries are not counted as its memory."""
    try:
        Session(calibrator, build("toy"), recompute=False).turn(Load(2, 8, 2))
    except TurnError as error:
        return str(error)
    return None


def _resident_bytes() -> int:
    return _status("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_resident_bytes() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak() -> None:
    """Let the peak begin again, where Linux lets a process do so; otherwise it is the peak since its start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _map_tensors() -> None:
    """From now on, where the C library can."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
