"""Programs that a benchmark starts, each within its time, and the memory of processes."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

PATIENCE = 3.0
"""Seconds that a program has to come to its end by itself, once it is interrupted."""

_LIBC = ctypes.CDLL(None)
# Of <sys/prctl.h>: the signal that a process gets when the one that started it is gone.
_PR_SET_PDEATHSIG = 1


def run_within(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None, patience: float = PATIENCE
) -> int | None:
    """The exit code of a program, whose output is shown; None if it was not done in time and was ended.

    Args:
        command: the program and its arguments.
        seconds: after which it is ended, with all that it started.
        environment: variables beside those of this process.
        patience: the last of these seconds, at most half, before which it is interrupted: pytest then shows what
            failed until then.
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
    """In the new process, before its program begins."""
    end_with_parent()
    # Where this process ignores interrupts, as one in the background of a shell does, the program would, too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Interrupt the whole process group, so that the program's workers end too; what is left of it is killed."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_with_parent() -> None:
    """In a new process, before its program begins: it is killed when the one that started it is gone.

    That may have been killed itself, which then ends nothing; and a program with a session of its own is in no group
    that is ended with it.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def memory_of(field: str, process: int | str = "self") -> int | None:
    """Bytes, by a field of Linux's /proc/PID/status; None where the process is over, or there is no such field."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
