"""Progress bars for long work: what, how far, at which rate, and how long it still takes."""

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


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            rate = "-"
        elif speed >= 1.0:
            rate = f"{speed:,.{0 if speed >= 100.0 else 1}f}"
        else:
            rate = f"{speed:.2g}"
        return Text(f"{rate} {task.fields['unit']}/s", no_wrap=True)


@contextmanager
def progress(console: Console, description: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    """Show a progress bar while the body runs; yields `advance(steps=1, total=None)`, which may correct the
    total. It goes if the body raises.

    Args:
        console: where it is drawn; nothing is where that is not a terminal.
        description: what is going on.
        total: number of steps.
        unit: what a step is, in the plural.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    )
    bar = Progress(*columns, console=console, disable=not console.is_terminal or console.quiet, expand=True)
    with bar:
        task = bar.add_task(description, total=total, unit=unit)

        def advance(steps: int = 1, total: int | None = None) -> None:
            bar.update(task, advance=steps, total=total)

        try:
            yield advance
        except BaseException:
            # An interrupted bar goes, so that the error stands alone.
            bar.live.transient = True
            raise


QUIET = Console(quiet=True)


class Clock:
    """Wall seconds by stage, in the order the stages ran."""

    def __init__(self) -> None:
        """No stage yet."""
        self.seconds: dict[str, float] = {}

    def copy(self) -> "Clock":
        """Another clock that has timed the same stages so far."""
        copied = Clock()
        copied.seconds = dict(self.seconds)
        return copied

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body as stage `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 4)
