"""Compare two sets of results: ratios B / A, with changes of more than 5 % flagged.

    python -m benchmarks.compare A B

A and B are each a file or folder of results, or the first characters of a revision with results in benchmarks/results.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import FOLDER, Record, latest, read

THRESHOLD = 0.05
# The metrics that are compared: (name, function that reads its value from a record). Lower is better for all of them.
_METRICS: tuple[tuple[str, Callable[[Record], float | None]], ...] = (
    ("ms", lambda found: found.ms_p50),
    ("peak bytes", lambda found: found.peak_memory),
    ("perplexity", lambda found: found.extra.get("perplexity")),
)


@dataclass(frozen=True)
class Change:
    """One metric of one provider in one case, in A and in B."""

    key: tuple[str, ...]
    metric: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """B / A: 1 if both are 0, infinite if only A is."""
        if self.before == 0.0:
            return 1.0 if self.after == 0.0 else float("inf")
        return self.after / self.before

    @property
    def flag(self) -> str:
        """'WORSE' or 'better' for a change of more than 5 %, otherwise empty."""
        if self.ratio > 1.0 + THRESHOLD:
            return "WORSE"
        return "better" if self.ratio < 1.0 - THRESHOLD else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per case and metric, then the cases that only one side has."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--results", type=Path, default=FOLDER, help="where revisions are looked up")
    options = parser.parse_args(arguments)
    try:
        before, after = (_load(source, options.results) for source in (options.a, options.b))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    changes = compare(before, after)
    for change in changes:
        print(
            f"{change.ratio:7.3f} {change.flag:7s} {change.before:12.4g} -> {change.after:12.4g} {change.metric:10s} "
            + " | ".join(change.key)
        )
    for side, only in (("A", _keys(before) - _keys(after)), ("B", _keys(after) - _keys(before))):
        for key in sorted(only):
            print(f"only in {side}: {' | '.join(key)}")
    flagged = [change.flag for change in changes]
    print(f"{len(changes)} compared, {flagged.count('WORSE')} worse and {flagged.count('better')} better by over 5 %")


def compare(before: Sequence[Record], after: Sequence[Record]) -> list[Change]:
    """Return the change of every metric that both sides have, taking the latest run of each case."""
    sides = [_values(latest(side)) for side in (before, after)]
    return [Change(key, metric, value, sides[1][key, metric]) for (key, metric), value in sides[0].items()
            if (key, metric) in sides[1]]  # fmt: skip


def _values(records: Sequence[Record]) -> dict[tuple[tuple[str, ...], str], float]:
    values = ((found.key, metric, value_of(found)) for found in records for metric, value_of in _METRICS)
    return {(key, metric): value for key, metric, value in values if value is not None}


def _keys(records: Sequence[Record]) -> set[tuple[str, ...]]:
    return {found.key for found in records}


def _load(source: str, folder: Path) -> list[Record]:
    if Path(source).exists():
        return read(Path(source))
    found = [record for record in read(folder) if record.environment.revision.startswith(source)]
    if not found:
        raise ValueError(f"'{source}' is neither a file or folder nor a revision with results in '{folder}'")
    return found


if __name__ == "__main__":
    main()
