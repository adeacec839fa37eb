"""How calibration's time and peak memory grow with parameters, tokens per sample and samples.

    python -m benchmarks.jobs.growth [--quick] [--device cuda]

Growth is given as an exponent, the slope of a straight line fitted to the logarithms: 1 is linear, 0 is constant. Even
the smallest points are large enough that the fixed cost of a call hardly counts.
"""

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.utils import logging

from benchmarks.jobs.calibrators import calibrators
from benchmarks.jobs.models import Load, build
from benchmarks.jobs.session import TIMEOUT, Session, Task, Turn, TurnError, Worker
from benchmarks.options import parse, parser
from benchmarks.progress import Deadline, say
from benchmarks.results import append, record
from benchmarks.timing import Timing
from gradprune.evaluation.size import model_size


@dataclass(frozen=True)
class Series:
    """The quantity that grows (`axis`), and its points (model size, load) in ascending order."""

    axis: str
    points: tuple[tuple[str, Load], ...]


def series_of(device: str, size: str) -> list[Series]:
    """Return the series to measure on a device; `size` is "full", "quick" or "toy".

    Points ascend, because memory that a larger point freed would hide the peak of a smaller one.
    """
    if size == "toy":
        return [Series("samples", tuple(("toy", Load(count, 8, 1)) for count in (1, 2)))]
    models, at, tokens = ("3M", "28M", "110M"), "28M", (64, 128, 256, 512)
    if device == "cuda":
        models, at, tokens = ("110M", "1B", "8B"), "1B", (256, 512, 1024, 2048)
    samples = (1, 2, 4, 8)
    if size == "quick":
        models, at, tokens, samples = models[:2], models[0], tokens[:2], samples[:2]
    return [
        Series("tokens", tuple((at, Load(1, count, 1)) for count in tokens)),
        Series("samples", tuple((at, Load(count, tokens[0], 1)) for count in samples)),
        Series("parameters", tuple((model, Load(1, tokens[1], 1)) for model in models)),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each series with this project and the plain pass by turns, and print the exponents."""
    options = parse(parser(__doc__), arguments)
    logging.set_verbosity_error()
    deadline = Deadline(options.seconds)
    dtype = "bf16" if options.device == "cuda" else "fp32"
    size = "toy" if options.toy else "quick" if options.quick else "full"
    for series in series_of(options.device, size):
        _measure(series, dtype, deadline, options)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line through (log x, log y); NaN for fewer than two positive points."""
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > 0 and b > 0]
    if len(points) < 2:
        return math.nan
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    spread = sum((a - mean_x) ** 2 for a, _ in points)
    return sum((a - mean_x) * (b - mean_y) for a, b in points) / spread if spread else math.nan


def _measure(series: Series, dtype: str, deadline: Deadline, options: Namespace) -> None:
    backend = "triton" if options.device == "cuda" else "cpp"
    names = (f"gradprune {backend}", "plain")
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
    sessions: dict[str, Session | Worker] = {}
    loaded, model_parameters = "", 0
    say(f"growth with {series.axis} on {options.device}")
    try:
        for model_name, load in series.points:
            # Assume that each point takes up to four times as long as the one before it.
            before = sum(4.0 * points[-1][1] for points in found.values() if points)
            if not deadline.allows(before + 2.0):
                say("    the time for this run is used up")
                break
            if model_name != loaded:
                _close(sessions)
                sessions, model_parameters = _open(names, backend, model_name, dtype, options.device)
                loaded = model_name
            x = {"tokens": load.tokens, "samples": load.samples, "parameters": model_parameters}[series.axis]
            for name, turns in _turns(sessions, load, deadline).items():
                timing = Timing.of([turn.seconds for turn in turns]) if turns else Timing.failed("it could not run")
                peak = max((turn.peak_memory for turn in turns), default=None)
                _append(series.axis, name, model_name, load, x, timing, peak, dtype, options)
                if timing.p50 is not None and peak is not None:
                    found[name].append((x, timing.p50 / 1e3, peak))
    finally:
        _close(sessions)
    for name, points in found.items():
        x, seconds, memory = zip(*points, strict=True) if points else ((), (), ())
        say(f"    {name}: time ~ {series.axis}^{exponent(x, seconds):.2f}, memory ~ ^{exponent(x, memory):.2f}")


def _open(
    names: Sequence[str], backend: str, size: str, dtype: str, device: str
) -> tuple[dict[str, Session | Worker], int]:
    """Open the sessions, and return them by name, with the model's number of parameters."""
    if device == "cpu":
        tasks = {name: Task(name, (backend,), size, dtype, False, torch.get_num_threads()) for name in names}
        return {name: Worker(task) for name, task in tasks.items()}, model_size(build(size)).parameters
    model = build(size, device, dtype)
    everyone = {one.name: one for one in calibrators((backend,))}
    return {name: Session(everyone[name], model, False) for name in names}, model_size(model).parameters


def _close(sessions: dict[str, Session | Worker]) -> None:
    for session in sessions.values():
        session.close()
    sessions.clear()


def _turns(
    sessions: dict[str, Session | Worker], load: Load, deadline: Deadline, repeats: int = 3
) -> dict[str, list[Turn]]:
    """Take turns, alternating, after one untimed batch each, and return them by name."""
    turns: dict[str, list[Turn]] = {name: [] for name in sessions}
    for repeat in range(1 + repeats):
        for name, session in sessions.items():
            try:
                timeout = min(TIMEOUT, max(deadline.left, 1.0))
                if repeat == 0:
                    session.scores(load, timeout)
                else:
                    turns[name].append(session.turn(load, timeout))
            except TurnError as error:
                say(f"    {name}: {error}")
    return turns


def _append(
    axis: str,
    name: str,
    size: str,
    load: Load,
    x: float,
    timing: Timing,
    peak: int | None,
    dtype: str,
    options: Namespace,
) -> None:
    shape = f"Llama {size}, {load.text}"
    extra = {"axis": axis, "x": x}
    made = record(
        "job",
        f"growth with {axis}",
        name,
        shape,
        dtype,
        options.device,
        peak_memory=peak,
        extra=extra,
        **timing.values(),
    )
    append(made, options.output)
    if timing.p50 is not None and peak is not None:
        say(f"    {name:18s} {axis} {x:>12,} {timing.p50:10.1f} ms {peak / 2**20:9.1f} MiB")


if __name__ == "__main__":
    main()
