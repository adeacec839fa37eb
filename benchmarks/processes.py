"""Running programs within a time limit, and reading the memory of processes."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

PATIENCE = 3.0
"""Seconds that an interrupted program has to finish by itself before it is killed."""

_LIBC = ctypes.CDLL(None)
# From <sys/prctl.h>: the option of prctl that sets the signal a process gets when its parent dies.
_PR_SET_PDEATHSIG = 1


def run_within(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None, patience: float = PATIENCE
) -> int | None:
    """Run a program, showing its output; return its exit code, or None if it ran out of time and was stopped.

    Args:
        command: the program and its arguments.
        seconds: time limit, after which the program is killed with everything that it started.
        environment: environment variables in addition to those of this process.
        patience: seconds at the end of the time limit, at most half of it, that the program has after an interrupt:
            pytest uses them to report what has failed so far.
    """
    patience = min(patience, seconds / 2)
    process = subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, start_new_session=True, preexec_fn=_begin
    )
    try:
        return process.wait(max(seconds - patience, 1.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            _end(process, patience)


def _begin() -> None:
    """Prepare the new process, before its program starts."""
    end_with_parent()
    # If this process ignores interrupts, as a shell makes background processes do, the program would inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Interrupt the whole process group, so that the program's workers end too, and then kill what is left of it."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_with_parent() -> None:
    """Have this process killed when its parent dies; called in a new process, before its program starts.

    A parent that is killed cannot stop its children, and a program with a session of its own is in no process group
    that is killed with the parent.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def memory_of(field: str, process: int | str = "self") -> int | None:
    """Bytes in a field of Linux's /proc/PID/status; None if the process has ended or the field does not exist."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
