"""The schema of benchmark results, and the records that are never written."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.environment import environment, revision, sources_hash
from benchmarks.results import CONDITIONS, InterpreterTimingError, Record, append, latest, percent, read
from helpers.benchmark_records import MACHINE, made


def full_record() -> Record:
    return made(
        "kernel",
        "taylor_score",
        "gradprune cpp",
        1.5,
        bytes=100,
        flops=7,
        gb_per_s=2.5,
        tflops=0.25,
        percent_of_floor=91.5,
        peak_memory=12,
        extra={"label": "a weight", "seeds": [1, 2]},
    )


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    records = [full_record(), made("job", "calibration", "naive", error="out of memory: it says")]
    files = {append(found, tmp_path) for found in records}
    assert sorted(found.kind for found in read(tmp_path)) == ["job", "kernel"]
    assert sorted(read(tmp_path), key=lambda found: found.kind) == [records[1], records[0]]
    assert {file.name for file in files} == {"a-cpu-2-cores-kernel.jsonl", "a-cpu-2-cores-job.jsonl"}


def test_results_are_appended(tmp_path: Path) -> None:
    file = append(full_record(), tmp_path)
    before = file.read_text()
    append(replace(full_record(), run="second"), tmp_path)
    assert file.read_text().startswith(before)
    assert [found.run for found in read(file)] == ["first", "second"]


def test_a_line_holds_the_whole_schema_flat() -> None:
    line = full_record().to_json()
    assert "\n" not in line
    for name in ("hardware", "driver", "torch", "triton", "revision", "name", "provider", "shape", "dtype", "ms_p20"):
        assert f'"{name}"' in line
    assert '"environment"' not in line


@pytest.mark.parametrize("line", ["{}", "[]", "no json", '{"kind": "kernel"}'])
def test_a_line_of_another_schema_is_named(tmp_path: Path, line: str) -> None:
    file = append(full_record(), tmp_path)
    with file.open("a") as lines:
        lines.write(line + "\n")
    with pytest.raises(ValueError, match=r"kernel\.jsonl, line 2"):
        read(file)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'opinion'"):
        made("opinion", "taylor_score", "eager", 1.0)


def test_timings_of_triton_under_its_interpreter_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = made("kernel", "taylor_score", "gradprune triton", 1.0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InterpreterTimingError, match="gradprune triton"):
        append(timed, tmp_path)
    assert not list(tmp_path.iterdir())
    append(made("kernel", "taylor_score", "gradprune triton", error="wrong result"), tmp_path)
    append(made("kernel", "taylor_score", "eager", 1.0), tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET")
    append(timed, tmp_path)
    assert len(read(tmp_path)) == 3


def test_only_the_latest_run_of_each_piece_of_work_counts() -> None:
    old = [made("kernel", "a", "eager", 1.0), made("kernel", "a", "copy", 1.0), made("kernel", "b", "eager", 1.0)]
    new = made("kernel", "a", "eager", 2.0, run="second")
    assert latest([new, *old]) == [new, old[2]]


@pytest.mark.parametrize("kind", ["quality", "calibration_size"])
def test_perplexities_of_several_runs_make_one_table(kind: str) -> None:
    def measured(provider: str, seed: int, run: str) -> Record:
        return made(kind, "demo", provider, shape="20%", run=run, extra={"seed": seed, "perplexity": 7.0})

    first = [measured("taylor", 0, "first"), measured("taylor", 1, "first"), measured("fisher", 0, "first")]
    again = measured("taylor", 0, "second")
    assert latest([*first, again]) == [again, *first[1:]]
    elsewhere = replace(again, run="third", environment=replace(MACHINE, hardware="another CPU"))
    assert latest([*first, again, elsewhere]) == [elsewhere, *first[1:]]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_record_replaces_none_measured_under_other_conditions(condition: str) -> None:
    def measured(run: str, value: int | None) -> Record:
        extra = {"seed": 0, "perplexity": 7.0, condition: value}
        return made("quality", "demo", "taylor", shape="20%", run=run, extra=extra)

    first, other, unlimited, again = (
        measured(run, value) for run, value in (("1", 64), ("2", 32), ("3", None), ("4", 64))
    )
    assert latest([first, other, unlimited, again]) == [again, other, unlimited]
    # Records without the condition, from before it was recorded, were measured without a limit.
    before = replace(unlimited, run="0", extra={"seed": 0, "perplexity": 7.0})
    assert latest([before, unlimited]) == [unlimited]


def test_ratios_are_written_as_exact_percentages() -> None:
    assert [percent(ratio) for ratio in (0.0, 0.1, 0.12, 0.125, 0.3, 0.5)] == [
        "0%",
        "10%",
        "12%",
        "12.5%",
        "30%",
        "50%",
    ]


def test_the_environment_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment("cpu")
    assert found.hardware
    assert found.torch
    assert found.driver is None
    revision.cache_clear()
    monkeypatch.setenv("GRADPRUNE_REVISION", "abc")
    assert revision() == "abc"
    monkeypatch.delenv("GRADPRUNE_REVISION")
    revision.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert revision() == f"sources-{sources_hash()}"
    revision.cache_clear()
    assert MACHINE.revision not in revision()
