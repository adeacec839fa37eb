"""Run programs with a deadline, after which a program and all processes that it started are killed."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

# Seconds, far more than any program here needs: a test that hangs should fail, and not hold up the others.
DEADLINE = 240.0


def run_program(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    given: str = "",
    deadline: float = DEADLINE,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end with `given` on its standard input, and `environment` over this process's own.

    Raises:
        AssertionError: it did not end by the deadline (seconds); the message includes its output.
    """
    process = subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **(environment or {})}, start_new_session=True, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(given, timeout=deadline)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"not done after {deadline:.0f} s: {' '.join(command)}\n{out}\n{err}") from None
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)
