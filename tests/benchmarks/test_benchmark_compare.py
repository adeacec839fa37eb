"""Comparison of two sets of benchmark results."""

from pathlib import Path

import pytest

from benchmarks.compare import compare, main
from benchmarks.results import Record, append
from helpers.benchmark_records import made


def timed(milliseconds: float, provider: str = "gradprune cpp", **values: object) -> Record:
    return made("kernel", "taylor_score", provider, milliseconds, **values)


@pytest.mark.parametrize(
    ("after", "flag"), [(10.4, ""), (9.6, ""), (10.6, "WORSE"), (9.4, "better"), (20.0, "WORSE"), (10.0, "")]
)
def test_a_change_over_five_percent_is_flagged(after: float, flag: str) -> None:
    (change,) = compare([timed(10.0)], [timed(after)])
    assert change.ratio == pytest.approx(after / 10.0)
    assert change.flag == flag


def test_memory_and_perplexity_are_compared_too() -> None:
    before = made("job", "calibration", "naive", 1.0, peak_memory=100)
    after = made("job", "calibration", "naive", 1.0, peak_memory=120)
    assert [(c.metric, c.flag) for c in compare([before], [after])] == [("ms", ""), ("peak bytes", "WORSE")]
    seeds = [
        made("quality", "demo", "taylor", extra={"perplexity": value, "seed": int(value)}) for value in (8.0, 12.0)
    ]
    worse = made("quality", "demo", "taylor", extra={"perplexity": 13.0, "seed": 12})
    (change,) = compare(seeds, [worse])
    assert (change.before, change.after, change.key[-1]) == (12.0, 13.0, "seed 12")
    assert change.flag == "WORSE"


def test_only_latest_runs_and_records_of_both_are_compared() -> None:
    before = [timed(1.0), timed(2.0, run="second"), timed(1.0, "only here", run="second")]
    (change,) = compare(before, [timed(2.0), timed(1.0, "only there")])
    assert (change.before, change.after) == (2.0, 2.0)


def test_the_command_prints_ratios_flags_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append(timed(10.0), tmp_path / "a")
    append(timed(5.0, "eager"), tmp_path / "a")
    append(timed(12.0), tmp_path / "b")
    main([str(tmp_path / "a"), str(tmp_path / "b")])
    shown = capsys.readouterr().out
    assert "1.200 WORSE" in shown
    assert "only in A" in shown
    assert "eager" in shown
    assert "1 compared, 1 worse and 0 better" in shown


def test_revisions_are_looked_up_in_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(timed(10.0), tmp_path)
    main(["01234567", "0123", "--results", str(tmp_path)])
    assert "1 compared, 0 worse" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["feed", "0123", "--results", str(tmp_path)])
    assert "'feed' is neither" in capsys.readouterr().err
