"""Progress of long operations: what is running, how far it is, its rate and the time left.

On a terminal, progress is a bar. Otherwise (a file or a pipe) it is one line at the start of each stage and another
every 30 seconds while the stage runs.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

logger = logging.getLogger(__name__)

_INTERVAL = 30.0  # seconds between lines if the output is not a terminal


class _Rate(ProgressColumn):
    """A column with the rate, in units per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_rate(speed) if speed else '-'} {task.fields['unit']}/s", no_wrap=True)


def say(console: Console, line: str) -> None:
    """Print one line of plain text; square brackets in a path or a name are not interpreted as markup."""
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(
    console: Console, description: str, total: int, unit: str, *, done: int = 0
) -> Iterator[Callable[..., None]]:
    """Show progress while the body runs; yields `advance(steps=1)`. If the body raises, the bar is removed.

    Args:
        console: where progress is shown.
        description: what is running.
        total: number of steps.
        unit: what a step is, in the plural.
        done: steps that an earlier process completed, which do not count towards the rate.
    """
    if not console.is_terminal:
        lines = _Lines(console, description, total, unit, done)
        yield lines.advance
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    )
    bar = Progress(*columns, console=console, disable=console.quiet, expand=True)
    with bar:
        task = bar.add_task(description, total=total, completed=done, unit=unit)

        def advance(steps: int = 1) -> None:
            bar.update(task, advance=steps)

        try:
            yield advance
        except BaseException:
            # Remove the interrupted bar, so that only the error remains on screen.
            bar.live.transient = True
            raise


class _Lines:
    """Progress as lines of text, if the output is not a terminal."""

    def __init__(self, console: Console, description: str, total: int, unit: str, done: int) -> None:
        self._console = console
        self._description = description
        self._total = total
        self._unit = unit
        self._before = self._done = done
        self._start = self._said = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._said >= _INTERVAL:
            self._said = now
            rate = (self._done - self._before) / (now - self._start)
            say(
                self._console,
                f"{self._description}: {self._done:,} of {self._total:,} {self._unit}, {_rate(rate)} {self._unit}/s, "
                f"{_duration((self._total - self._done) / rate) if rate else 'unknown time'} left",
            )


def _rate(speed: float) -> str:
    return f"{speed:,.{0 if speed >= 100.0 else 1}f}" if speed >= 1.0 else f"{speed:.2g}"


def _duration(seconds: float) -> str:
    """Format as 1:02:03 or, below an hour, 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


QUIET = Console(quiet=True)


class Clock:
    """Wall time of each stage in seconds, in the order they ran.

    running: the stage that is running, or that failed.
    """

    def __init__(self, console: Console = QUIET) -> None:
        """Start without stages. Each is announced on `console` when it begins, unless that is a terminal with bars."""
        self.seconds: dict[str, float] = {}
        self.running: str | None = None
        self.console = console

    def copy(self) -> "Clock":
        """Return a new clock with the stages timed so far."""
        copied = Clock(self.console)
        copied.seconds = dict(self.seconds)
        return copied

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body as stage `name`."""
        words = name.replace("_", " ").capitalize()
        if not self.console.is_terminal:
            say(self.console, f"{words} ...")
        self.running = name
        start = time.perf_counter()
        yield
        self.running = None
        self.seconds[name] = round(time.perf_counter() - start, 4)
        logger.info("%s took %.2f s", words, self.seconds[name])
