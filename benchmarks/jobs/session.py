"""Sessions of one provider with one model: its scores of a first batch, timed turns, and peak memory.

`Session` runs in this process. It is used on a GPU, where PyTorch's allocator counts memory and providers share a
model. `Worker` runs a session in a separate process. It is used on the CPU, where peak memory can only be measured per
process, and where a peer that hangs can then be killed.
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
from benchmarks.processes import memory_of
from benchmarks.timing import first_line, free, out_of_memory

# Seconds that a worker may take to start, and those that it may take for a turn.
TIMEOUT = 120.0
# With Task.mapped, allocations of at least _MAPPED_BYTES get their own mapping; _M_MMAP_THRESHOLD is mallopt's
# number for that parameter.
_MAPPED_BYTES, _M_MMAP_THRESHOLD = 64 << 10, -3


@dataclass(frozen=True)
class Task:
    """A worker's task: `provider` of `calibrators(backends)` on a random Llama of `size`.

    mapped: each larger tensor gets its own memory mapping, so that resident memory is that of live tensors. Otherwise
        the C library's heap returns freed memory late, or not at all if something above it is in use. Mapping is
        slower, so such a worker is not timed.
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
    """One calibration: its seconds, its peak memory in bytes on top of the loaded model, and seconds of its parts.

    peak_memory: on a GPU that of tensors; on the CPU that of the process, including freed memory that the heap keeps
        (see `Task`).
    """

    seconds: float
    peak_memory: int
    parts: dict[str, float]


class TurnError(Exception):
    """A provider could not finish its turn: out of memory, a timeout, a missing package."""


class Session:
    """A provider in this process."""

    def __init__(self, calibrator: Calibrator, model: PreTrainedModel, recompute: bool) -> None:
        """Take a model, which turns leave as it is except for its attention implementation."""
        self._calibrator = calibrator
        self._model = model
        self._recompute = recompute
        self._held = _resident_bytes()

    def scores(self, load: Load, _timeout: float = TIMEOUT) -> dict[str, Tensor]:
        """Return the scores of the load's first batch; this also warms up. Within this process there is no time limit.

        Raises:
            TurnError: the provider failed.
        """
        return self._run(samples(self._model, load)[:1]).scores

    def turn(self, load: Load, _timeout: float = TIMEOUT) -> Turn:
        """Run and measure one whole calibration.

        Raises:
            TurnError: the provider failed.
        """
        batches = samples(self._model, load)
        cuda = self._model.device.type == "cuda"
        if cuda:
            free("cuda")
            # A batch before the timed turn, so that no memory is requested from the driver during it.
            self._run(batches[:1])
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
        """Do nothing; the method exists because `Worker`, with the same interface, has to be closed."""

    def _run(self, batches: list[Tensor]) -> Outcome:
        self._model.set_attn_implementation(self._calibrator.attention)
        try:
            return self._calibrator.run(self._model, batches, self._recompute)
        except Exception as error:  # whatever a peer raises is recorded as its result
            raise TurnError(
                f"out of memory: {first_line(error)}" if out_of_memory(error) else first_line(error)
            ) from error
        finally:
            self._model.zero_grad(set_to_none=True)


class Worker:
    """A provider in its own process; whatever goes wrong there is raised as `TurnError`."""

    def __init__(self, task: Task) -> None:
        """Start the process and wait until it has loaded the model, so that workers do not load at the same time."""
        # The fork server imports the libraries once, before it has any threads, and forks one process per worker.
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
            # It died; the next call raises TurnError.
            self._process.join(10.0)

    def scores(self, load: Load, timeout: float = TIMEOUT) -> dict[str, Tensor]:
        """See `Session.scores`; raises `TurnError` also after `timeout` seconds."""
        return {name: torch.tensor(values) for name, values in self._ask("scores", load, timeout).items()}

    def turn(self, load: Load, timeout: float = TIMEOUT) -> Turn:
        """See `Session.turn`; raises `TurnError` also after `timeout` seconds."""
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
    """The worker's process: answer requests ("scores" | "turn", load) until the other end closes."""
    torch.set_num_threads(task.threads)
    if task.mapped:
        _map_tensors()
    calibrator = next(one for one in calibrators(task.backends) if one.name == task.provider)
    failure = _warm_libraries(calibrator)
    session = Session(calibrator, build(task.size, dtype=task.dtype), task.recompute)
    answers: dict[str, Callable[[Load], Any]] = {
        # As lists, because multiprocessing would pass tensors through shared memory.
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
    """Run a toy calibration first, so that lazily loaded libraries do not count as the provider's memory."""
    try:
        Session(calibrator, build("toy"), recompute=False).turn(Load(2, 8, 2))
    except TurnError as error:
        return str(error)
    return None


def _resident_bytes() -> int:
    return memory_of("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_resident_bytes() -> int:
    return memory_of("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak() -> None:
    """Reset the peak if Linux permits it; otherwise the peak remains the highest since the process started."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _map_tensors() -> None:
    """Give larger allocations their own mappings from now on, if the C library supports it."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
