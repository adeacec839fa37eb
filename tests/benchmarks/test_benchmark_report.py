"""The report is made of the results alone, the same bytes every time."""

from pathlib import Path

import pytest

from benchmarks.jobs.growth import exponent
from benchmarks.report import BEGIN, END, main, replace_section
from benchmarks.results import Record, append
from helpers.benchmark_records import made

README = f"# A project\n\nBefore.\n\n{BEGIN}\nold figures\n{END}\n\nAfter.\n"


def fixture_records() -> list[Record]:
    records = []
    for dtype in ("fp32", "bf16"):
        for provider, milliseconds in (("copy", 2.0), ("eager", 50.0), ("gradprune cpp", 2.5)):
            extra = {"label": "Llama-3-8B q", "floor": provider == "copy", "elements": 32}
            rates = {"gb_per_s": 20.0 / milliseconds, "percent_of_floor": 200.0 / milliseconds, "bytes": 1000}
            records.append(made("kernel", "taylor_score", provider, milliseconds, dtype=dtype, extra=extra, **rates))
    records.append(made("kernel", "grad_stats", "all", error="skipped: the time for this run was used up"))
    jobs = [("forward", 30.0, 190), ("plain", 100.0, 400), ("gradprune cpp", 107.0, 200), ("naive", 160.0, 900)]
    for provider, milliseconds, peak in jobs:
        shape, memory = "Llama 3M, 4x128 tokens by 2", {"peak_memory": peak << 20, "extra": {"weight_bytes": 400 << 20}}
        records.append(made("job", "calibration", provider, milliseconds, shape=shape, **memory))
    records.append(made("job", "calibration", "torch-pruning GroupTaylor", shape=shape, error="out of memory: x | y"))
    for x in (1, 2, 4):
        extra = {"axis": "samples", "x": x}
        records.append(
            made("job", "growth with samples", "plain", 3.0 * x, shape=f"{x}", peak_memory=5 << 20, extra=extra)
        )
    records.append(made("job", "score, select, cut", "gradprune all", 12.0, extra={"step": "all"}))
    for seed in (0, 1):
        for provider, value in (("gradprune taylor T=0", 7.0), ("gradprune taylor T=1", 6.5), ("torch-pruning", 9.0)):
            extra = {"ratio": 0.2, "seed": seed, "perplexity": value + seed, "perplexity_dense": 4.25, "kept": 0.8}
            records.append(made("quality", "stories", provider, shape="20%", extra=extra))
    for provider, speed in (("dense", 1000.0), ("round_to 8", 1500.0)):
        extra = {"tokens_per_s": speed, "parameters": 3e6, "weight_bytes": 6 << 20, "ratio": 0.3}
        records.append(made("inference", "prefill", provider, 1e5 / speed, extra=extra))
    return records


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for found in fixture_records():
        append(found, tmp_path / "results")
    return tmp_path / "results"


def rebuild(results: Path, folder: Path) -> tuple[Path, Path]:
    folder.mkdir()
    readme = folder / "project.md"
    readme.write_text(README)
    main(["--results", str(results), "--output", str(folder), "--readme", str(readme)])
    return folder, readme


def test_the_same_results_make_the_same_bytes(results: Path, tmp_path: Path) -> None:
    first, _ = rebuild(results, tmp_path / "first")
    second, readme = rebuild(results, tmp_path / "second")
    main(["--results", str(results), "--output", str(second), "--readme", str(readme)])
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert len([file for file in files if file.suffix == ".svg"]) == 3
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_the_report_shows_the_records(results: Path, tmp_path: Path) -> None:
    folder, readme = rebuild(results, tmp_path / "report")
    report = (folder / "README.md").read_text()
    assert "| Llama-3-8B q 4x8 fp32 | gradprune cpp | 2.250 | 2.500 | 3.000 | 8.0 | 80 |" in report
    assert "| gradprune cpp | 96.300 | 107 | 128 | 1.07 | 200.0 | 0.50 | 2.5% |" in report
    assert "out of memory: x / y" in report
    assert "| samples, 1 to 4 | plain | 1.00 | 0.00 |" in report
    assert "7.50 (7.00 to 8.00)" in report
    assert "1500.0 | 1.50 |" in report
    assert "skipped: the time for this run was used up" in report
    for image in folder.rglob("*.svg"):
        assert f"plots/{image.name}" in report
    section = readme.read_text().split(BEGIN)[1].split(END)[0]
    assert "80 % | 20.00 |" in section
    assert "| gradprune cpp | 1.00 | 1.00 | 2.5% |" in section
    assert "| naive | 1.50 | 4.50 | 177.5% |" in section
    assert "| torch-pruning GroupTaylor | out of memory | - | - |" in section
    assert "| gradprune taylor | 7.50 / **7.00** |" in section


def test_only_the_section_of_the_readme_changes(results: Path, tmp_path: Path) -> None:
    _, readme = rebuild(results, tmp_path / "report")
    text = readme.read_text()
    assert text.startswith(f"# A project\n\nBefore.\n\n{BEGIN}\n")
    assert text.endswith(f"{END}\n\nAfter.\n")
    assert "old figures" not in text


def test_a_readme_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing to replace")
    with pytest.raises(ValueError, match="once each"):
        replace_section(tmp_path / "README.md", "text")


def test_an_exponent_is_the_slope_of_the_logarithms() -> None:
    assert exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    assert exponent([1, 2], [5.0, 5.0]) == pytest.approx(0.0)
    assert str(exponent([1], [5.0])) == "nan"
