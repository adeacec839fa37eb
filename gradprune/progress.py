"""Progress bars for long work: what, how far, at which rate, and how long it still takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    """Units a second, or seconds a unit where that is the larger number."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields["unit"]
        if not speed:
            return Text(f"- {unit}/s")
        return Text(f"{speed:.1f} {unit}/s" if speed >= 1.0 else f"{1.0 / speed:.1f} s/{unit}")


@contextmanager
def progress(console: Console, description: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    """Show a progress bar while the body runs; yields `advance(steps=1)`.

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
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    bar = Progress(*columns, console=console, disable=not console.is_terminal or console.quiet, expand=True)
    with bar:
        task = bar.add_task(description, total=total, unit=unit)

        def advance(steps: int = 1) -> None:
            bar.update(task, advance=steps)

        yield advance
