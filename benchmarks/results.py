"""Results of benchmarks, stored as one JSON object per line in one schema; they are appended and never rewritten."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks.environment import Environment, environment

Kind = Literal[
    "kernel",
    "job",
    "quality",
    "calibration_size",
    "distilled_text",
    "recovery",
    "inference",
    "vanishing",
    "experts",
    "predicted",
    "compiled",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
ANY_HARDWARE = "any hardware"
_ANYWHERE = frozenset({"quality", "calibration_size", "distilled_text", "recovery", "vanishing", "experts", "compiled"})
CONDITIONS = ("num_samples", "seq_len", "eval_windows", "max_questions")
"""Fields of `Record.extra` that a perplexity or an accuracy depends on; no table mixes different values of them."""
FOLDER = Path(__file__).resolve().parent / "results"


class InterpreterTimingError(Exception):
    """A Triton kernel was timed under Triton's interpreter, which says nothing about its speed."""


@dataclass(frozen=True)
class Record:
    """One provider's result in one case.

    run: id of the benchmark run that it belongs to; ratios are taken within one run only.
    name: the op or job. provider: the implementation or method that was measured. shape: the size of the case, e.g.
        "4096x14336". dtype: e.g. "bf16".
    ms_p20, ms_p50, ms_p80: milliseconds, percentiles of `repeats` measurements; None if nothing was timed. In the kind
        "predicted", ms_p50 is a prediction instead of a measurement, and `hardware` the device that it is for.
    bytes, flops: the minimum that the case requires. gb_per_s, tflops: these divided by the median time.
    percent_of_floor: the floor's median time divided by this one, times 100; the floor was timed in the same run.
    peak_memory: bytes on top of what was allocated before.
    error: why there is no timing: out of memory, a wrong result, a timeout, a missing package.
    extra: fields that only this benchmark has.
    """

    kind: Kind
    name: str
    provider: str
    shape: str
    dtype: str
    environment: Environment
    run: str
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    repeats: int = 0
    bytes: int | None = None
    flops: int | None = None
    gb_per_s: float | None = None
    tflops: float | None = None
    percent_of_floor: float | None = None
    peak_memory: int | None = None
    error: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the kind.

        Raises:
            ValueError: the kind is unknown.
        """
        if self.kind not in KINDS:
            raise ValueError(f"kind: '{self.kind}' is none of {', '.join(KINDS)}")

    @property
    def hardware(self) -> str:
        """The hardware that the result depends on; `ANY_HARDWARE` for perplexities and compiled kernels."""
        return ANY_HARDWARE if self.kind in _ANYWHERE else self.environment.hardware

    @property
    def work(self) -> tuple[str, ...]:
        """The case and the hardware: records that agree in these are comparable."""
        return (self.hardware, self.kind, self.name, self.shape, self.dtype)

    @property
    def key(self) -> tuple[str, ...]:
        """`work`, the provider and, if the record has them, the seed and the conditions."""
        named = [f"{name} {value}" for name in ("seed", *CONDITIONS) if (value := self.extra.get(name)) is not None]
        return (*self.work, self.provider, *named)

    @property
    def conditions(self) -> tuple[int | None, ...]:
        """The value of each of `CONDITIONS`, None if it does not apply or is unlimited."""
        return tuple(self.extra.get(name) for name in CONDITIONS)

    def to_json(self) -> str:
        """One line of JSON, with the environment's fields on the same level as the record's own."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name != "environment"}
        return json.dumps({**values, **asdict(self.environment)})

    @classmethod
    def from_json(cls, line: str) -> "Record":
        """The record in one line of JSON.

        Raises:
            ValueError: the line is not a record of this schema.
        """
        try:
            values = json.loads(line)
            of_environment = {spec.name: values.pop(spec.name) for spec in fields(Environment)}
            return cls(environment=Environment(**of_environment), **values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a record of this schema ({error}): {line[:80]}") from error


def record(kind: Kind, name: str, provider: str, shape: str, dtype: str, device: str, **values: Any) -> Record:
    """Make a record of this run on this machine."""
    return Record(kind, name, provider, shape, dtype, environment(device), run_id(), **values)


def percent(ratio: float) -> str:
    """Format a ratio as records and tables name it, each ratio differently: 0.2 as "20%", 0.125 as "12.5%"."""
    return f"{100.0 * ratio:g}%"


@cache
def run_id() -> str:
    """The id of this run: when it began to measure, in UTC, and the process id, so that simultaneous runs differ."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{os.getpid()}"


def append(found: Record, folder: Path) -> Path:
    """Append a record to the file for its hardware and kind in `folder`, and return that file.

    Raises:
        InterpreterTimingError: a Triton provider was timed under Triton's interpreter.
    """
    timed = found.ms_p50 is not None and found.kind != "predicted"
    if timed and "triton" in found.provider and os.environ.get("TRITON_INTERPRET") == "1":
        raise InterpreterTimingError(
            f"{found.name} by {found.provider} was timed under TRITON_INTERPRET=1; that is no performance result"
        )
    hardware = re.sub(r"[^a-z0-9]+", "-", found.environment.hardware.lower()).strip("-")
    file = folder / f"{hardware}-{found.kind}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(found.to_json() + "\n")
    return file


def read(path: Path) -> list[Record]:
    """Read the records of a file, or of all `.jsonl` files in a folder, file by file in the order of their lines.

    Raises:
        ValueError: a line is not a record; the message names the file and the line.
        FileNotFoundError: there is no such file or folder.
    """
    if not path.exists():
        raise FileNotFoundError(f"there are no results at '{path}'")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [found for file in files for found in _read_file(file)]


def latest(records: Iterable[Record]) -> list[Record]:
    """Return the records of each case's last run, in order.

    Times are comparable only within a run, so a case is taken from one run as a whole. Results that depend on no
    hardware are comparable across runs, and one table may be measured in several: for these, the last run is taken
    separately for each provider, seed and set of conditions.
    """
    by_work: dict[tuple[str, ...], list[Record]] = {}
    for found in records:
        by_work.setdefault(found.key if found.kind in _ANYWHERE else found.work, []).append(found)
    # A run's id begins with its start time.
    last = {key: max(found.run for found in group) for key, group in by_work.items()}
    return [found for key, group in by_work.items() for found in group if found.run == last[key]]


def _read_file(file: Path) -> Iterator[Record]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            yield Record.from_json(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
