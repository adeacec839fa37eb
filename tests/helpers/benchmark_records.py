"""Made-up benchmark records, so that no test depends on a measurement."""

from typing import Any

from benchmarks.environment import Environment
from benchmarks.results import Record

MACHINE = Environment(
    device="cpu",
    hardware="A CPU, 2 cores",
    driver=None,
    threads=2,
    python="3.11.7",
    torch="2.13.0",
    triton=None,
    transformers="5.23.0",
    gradprune="0.1.0",
    revision="0123456789ab",
)


def made(kind: str, name: str, provider: str, milliseconds: float | None = None, **values: Any) -> Record:
    defaults: dict[str, Any] = {"shape": "4x8", "dtype": "fp32", "environment": MACHINE, "run": "first"}
    if milliseconds is not None:
        times = {"ms_p20": 0.9 * milliseconds, "ms_p50": milliseconds, "ms_p80": 1.2 * milliseconds, "repeats": 5}
        defaults.update(times)
    return Record(kind=kind, name=name, provider=provider, **{**defaults, **values})  # type: ignore[arg-type]
