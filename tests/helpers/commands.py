"""Run the command in a separate process, which can be killed; it is forked, so that nothing is imported again."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from gradprune.cli import main
from gradprune.progress import Clock
from helpers.programs import DEADLINE

QUICK = ("--num_samples", "8", "--seq_len", "16", "--batch_size", "4", "--backend", "reference", "--no_measure_speed")


@dataclass
class Process:
    """A running command; `output` is the reading end of a pipe that receives its standard output and error."""

    pid: int
    output: int

    def wait(self) -> tuple[int, str]:
        """Return its exit code, which is negative if a signal killed it, and its output.

        Raises:
            AssertionError: it did not end by the deadline and was killed; the message includes its output.
        """
        alarm = threading.Timer(DEADLINE, os.kill, (self.pid, signal.SIGABRT))
        alarm.start()
        try:
            with os.fdopen(self.output, "rb") as output:
                printed = output.read().decode(errors="replace")
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        finally:
            alarm.cancel()
        assert code != -signal.SIGABRT, f"not done after {DEADLINE:.0f} s:\n{printed}"
        return code, printed


def start(cwd: Path, *arguments: object, prepare: Callable[[], object] = lambda: None) -> Process:
    """Start `gradprune arguments` in `cwd`, in a process that calls `prepare()` first."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Process(pid, reading)
    code = 1
    try:
        os.chdir(cwd)
        # Handle signals as a program started from a terminal does, even if this process ignores them.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        for stream in (1, 2):
            os.dup2(writing, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, encoding="utf-8") for stream in (1, 2))
        sys.argv = ["gradprune", *map(str, arguments)]
        prepare()
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(cwd: Path, *arguments: object, prepare: Callable[[], object] = lambda: None) -> tuple[int, str]:
    """Run `gradprune arguments` to its end; return its exit code and output."""
    return start(cwd, *arguments, prepare=prepare).wait()


def at_stage(name: str, act: Callable[[], object]) -> Callable[[], None]:
    """Return a `prepare` that makes the process call `act` when the run's stage `name` begins."""

    def prepare() -> None:
        stage = Clock.stage

        @contextmanager
        def disturbed(self: Clock, running: str):
            with stage(self, running):
                if running == name:
                    act()
                yield

        pytest.MonkeyPatch().setattr(Clock, "stage", disturbed)

    return prepare


def signalled(number: signal.Signals) -> Callable[[], None]:
    """Return a function that sends a signal to the process that calls it."""
    return lambda: os.kill(os.getpid(), number)
