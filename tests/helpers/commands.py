"""The command in a process of its own that can be killed; forked, so that nothing is imported again."""

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
    """A running command; its output is in a pipe, which holds all of it."""

    pid: int
    output: int

    def wait(self) -> tuple[int, str]:
        """Its exit code, negative for the signal that killed it, and what it wrote.

        Raises:
            AssertionError: it did not end by the deadline, and is gone now; the message has what it wrote.
        """
        alarm = threading.Timer(DEADLINE, os.kill, (self.pid, signal.SIGABRT))
        alarm.start()
        try:
            with os.fdopen(self.output, "rb") as output:
                said = output.read().decode(errors="replace")
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        finally:
            alarm.cancel()
        assert code != -signal.SIGABRT, f"not done after {DEADLINE:.0f} s:\n{said}"
        return code, said


def start(cwd: Path, *arguments: object, prepare: Callable[[], object] = lambda: None) -> Process:
    """Start `gradprune arguments` in `cwd`, after `prepare()` in its process."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Process(pid, reading)
    code = 1
    try:
        os.chdir(cwd)
        # As a terminal starts it, whatever this process was told to ignore.
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
    """Exit code and output of a command that is left to end."""
    return start(cwd, *arguments, prepare=prepare).wait()


def at_stage(name: str, act: Callable[[], object]) -> Callable[[], None]:
    """For `prepare`: do something as a stage of the run begins."""

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
    """Send the process a signal."""
    return lambda: os.kill(os.getpid(), number)
