"""The report is made from only the results, with the same bytes every time."""

import math
from pathlib import Path

import pytest

from benchmarks.jobs.growth import exponent
from benchmarks.report import PICTURE, main, replace_sections
from benchmarks.results import Record, append
from benchmarks.summary import MODELS, MOST_ROWS, QUALITY, SECTIONS
from helpers.benchmark_records import made


def text_with(*names: str) -> str:
    sections = "".join(f"\n<!-- results: {name} -->\nold figures\n<!-- end -->\n" for name in names)
    return f"# A project\n{sections}\nAfter.\n"


def section(text: str, name: str) -> str:
    return text.split(f"<!-- results: {name} -->\n")[1].split("<!-- end -->")[0]


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")][2:]


PERPLEXITIES = {
    "gradprune taylor T=0": 7.0,
    "gradprune taylor + least squares T=0": 5.0,
    "gradprune taylor + least squares T=1": 5.004,
    "gradprune fisher + least squares T=0": 6.0,
    "gradprune fisher + least squares T=1": 5.5,
    "gradprune group_fisher + least squares T=0": 5.0,
    "gradprune magnitude T=0": 8.0,
    "gradprune magnitude + least squares T=0": 6.0,
    "gradprune magnitude + least squares T=1": 6.5,
    "torch-pruning GroupTaylor": 9.0,
}


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
        extra = {"axis": "layers", "x": x, "stage": "calibration", "cpu_seconds": 3.0 * x, "predicted": 5 << 20}
        records.append(
            made("job", "memory with calibration", "gradprune streamed", shape=f"{x}", peak_memory=5 << 20, extra=extra)
        )
    for method, ratio in (("group_fisher", 1.09), ("taylor", 1.04)):
        extra = {"ratio": ratio, "lowest": 1.0, "highest": 1.2}
        records.append(made("job", "overhead of streaming", "streamed", shape=f"smol, 4x8, {method}", extra=extra))
    records.append(made("job", "score, select, cut", "gradprune all", 12.0, extra={"step": "all"}))
    for seed in (0, 1):
        for provider, value in PERPLEXITIES.items():
            extra = {
                "ratio": 0.2, "seed": seed, "perplexity": value + seed, "perplexity_dense": 4.25, "kept": 0.8,
                "num_samples": 128,
            }  # fmt: skip
            answered = {**extra, "accuracies": {"piqa": 0.5, "arc": 0.25 + 0.02 * seed}}
            records += [
                made("quality", "stories", provider, shape="20%", extra=answered),
                made("quality", MODELS[0], provider, shape="20%", extra={**extra, "perplexity": 2.0 * value}),
            ]
    for size, seed, value in ((64, 0, math.e**2), (64, 1, math.e**3), (256, 0, math.e)):
        extra = {"ratio": 0.5, "seed": seed, "perplexity": value, "perplexity_dense": 1.0, "num_samples": size}
        records.append(made("calibration_size", "smol", "FLAP", shape=f"50%, {size} samples", extra=extra))
    trained = {"steps": 50, "tokens": 51200, "processor_seconds": 300.0}
    for provider, value, more in (("dense", 4.0, {}), ("pruned", 16.0, {}), ("recovered", 8.0, trained)):
        extra = {
            "perplexity": value, "perplexity_dense": 4.0, "accuracies": {"piqa": 0.5, "arc": 0.25}, "eval_windows": 96,
            "max_questions": None, **more,
        }  # fmt: skip
        records.append(made("recovery", "smol", provider, shape="30% removed", extra=extra))
    for name, best in (("deep healthy", "none"), ("deep suffering", "adaptive")):
        for fix in ("none", "adaptive"):
            for temperature in (0.0, 1.0):
                extra = {
                    "temperature": temperature, "gradient_fix": fix, "gradient_ratio_before": 5642.0,
                    "gradient_ratio_after": 276.0, "first_mlp_pruned": 0.84, "over_pruned_blocks": 3,
                    "perplexity_dense": 9.0, "perplexity": 9.5 if fix == best else 10.5 + temperature,
                }  # fmt: skip
                provider = f"gradprune {fix} T={temperature:g}"
                records.append(made("vanishing", name, provider, shape="50%", extra=extra))
    for repair, value in (("no repair", 6.0), ("experts too", 5.25)):
        extra = {"perplexity_dense": 5.0, "perplexity": value}
        records.append(made("experts", "mixture", repair, shape="experts 30%, 4 samples", extra=extra))
    for provider, speed in (("dense", 1000.0), ("round_to 8", 1500.0)):
        extra = {"tokens_per_s": speed, "parameters": 3e6, "weight_bytes": 6 << 20, "ratio": 0.3}
        records.append(made("inference", "prefill", provider, 1e5 / speed, extra=extra))
    return records


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for found in fixture_records():
        append(found, tmp_path / "results")
    return tmp_path / "results"


def rebuild(results: Path, folder: Path) -> Path:
    for name, sections in SECTIONS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text_with(*sections))
    main(["--results", str(results), "--root", str(folder)])
    return folder


def test_the_same_results_make_the_same_bytes(results: Path, tmp_path: Path) -> None:
    first, second = (rebuild(results, tmp_path / name) for name in ("first", "second"))
    main(["--results", str(results), "--root", str(second)])
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert len([file for file in files if file.suffix == ".svg"]) == 5
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_large_models_shows_what_streaming_costs(results: Path, tmp_path: Path) -> None:
    shown = section((rebuild(results, tmp_path / "report") / "docs/large-models.md").read_text(), "streaming")
    assert "Calibrating smol, which fits in memory, takes 1.04 to 1.09 times as much processor time with " in shown
    assert rows(shown) == ["| layers | calibration | gradprune streamed | 1.00 | 0.00 |"]
    report = (tmp_path / "report/benchmarks/README.md").read_text()
    assert "| smol, 4x8, taylor, fp32 | 0 | 1.04 | 1.00 | 1.20 |" in report


def test_the_serving_guide_shows_what_recovery_regains(results: Path, tmp_path: Path) -> None:
    shown = section((rebuild(results, tmp_path / "report") / "docs/serving.md").read_text(), "recovery")
    assert "smol with 30% removed, repaired: 50 steps, 51,200 tokens and 5 minutes of processor time" in shown
    assert "bring log perplexity 50% of the way back" in shown
    assert "measured on 96 windows and all questions per task" in shown
    assert rows(shown)[2] == "| smol, 30% removed | recovered | 8.00 | 50% | 37.5 | 25.0 | 50.0 | 50 |"
    assert shown.split("\n\n")[-1].strip() in (tmp_path / "report/benchmarks/README.md").read_text()


def test_the_report_shows_the_records(results: Path, tmp_path: Path) -> None:
    folder = rebuild(results, tmp_path / "report") / "benchmarks"
    report = (folder / "README.md").read_text()
    assert "| Llama-3-8B q 4x8 fp32 | gradprune cpp | 2.250 | 2.500 | 3.000 | 8.0 | 80 |" in report
    assert "| gradprune cpp | 96.300 | 107 | 128 | 1.07 | 200.0 | 0.50 | 2.5% |" in report
    assert "out of memory: x / y" in report
    assert "| samples, 1 to 4 | plain | 1.00 | 0.00 |" in report
    assert "7.50 (7.00 to 8.00)" in report
    assert "| provider | 20% removed | zero-shot, 20% |" in report
    assert "| gradprune taylor T=0 | 7.50 (7.00 to 8.00) | 38.0 |" in report
    assert f"#### {MODELS[0]}, dense 4.25\n" in report
    assert "1500.0 | 1.50 |" in report
    assert "skipped: the time for this run was used up" in report
    assert "| deep healthy | 0 | none | 5,642 | 276 | 84% | 3 | 9.00 | 9.50 |" in report
    for image in folder.rglob("*.svg"):
        assert f"plots/{image.name}" in report or image.name == PICTURE


def test_the_readme_shows_short_tables_that_anyone_can_rebuild(results: Path, tmp_path: Path) -> None:
    readme = (rebuild(results, tmp_path / "report") / "README.md").read_text()
    assert "old figures" not in readme
    assert "stories" not in readme
    # Ours took 107 ms and 200 MiB, but the peer ran out of memory, so nothing can be claimed about it.
    assert "Torch-Pruning" not in section(readme, "claim")
    assert "| 80 | 20.00 |" in section(readme, "ops")
    calibration = section(readme, "calibration")
    assert "| gradprune cpp | 1.00 | 1.00 | 2.5% |" in calibration
    assert "| naive | 1.50 | 4.50 | 177.5% |" in calibration
    assert "| torch-pruning GroupTaylor | out of memory | - | - |" in calibration
    quality = section(readme, "quality")
    assert "| `group_fisher`, repaired | **10.00** |" in quality
    assert "| Torch-Pruning `GroupTaylor`, its defaults | 18.00 |" in quality
    for table in (section(readme, "ops"), calibration, quality):
        assert 0 < len(rows(table)) <= MOST_ROWS


def test_all_providers_of_the_readme_fit_its_table(tmp_path: Path) -> None:
    extra = {"ratio": 0.2, "seed": 0, "perplexity": 5.0, "perplexity_dense": 4.0, "kept": 0.8, "num_samples": 256}
    for provider in QUALITY:
        append(made("quality", MODELS[0], provider, shape="20%", extra=extra), tmp_path / "results")
    readme = (rebuild(tmp_path / "results", tmp_path / "report") / "README.md").read_text()
    assert len(rows(section(readme, "quality"))) == len(QUALITY)


def test_different_numbers_of_samples_share_no_table(results: Path, tmp_path: Path) -> None:
    # A later run measures only some of the providers.
    for provider in ("gradprune taylor T=0", "torch-pruning GroupTaylor"):
        extra = {"ratio": 0.2, "seed": 0, "perplexity": 3.0, "perplexity_dense": 4.25, "kept": 0.8, "num_samples": 256}
        for name in ("stories", MODELS[0]):
            append(made("quality", name, provider, shape="20%", extra=extra, run="second"), results)
    folder = rebuild(results, tmp_path / "report")
    report = (folder / "benchmarks/README.md").read_text()
    earlier, later = (
        report.split(f"#### stories, {samples} samples, dense")[1].split("####")[0] for samples in (128, 256)
    )
    assert "| gradprune taylor T=0 | 7.50 (7.00 to 8.00) |" in earlier
    assert "| gradprune magnitude T=0 |" in earlier
    assert rows(later) == [
        "| gradprune taylor T=0 | 3.00 (3.00 to 3.00) |",
        "| torch-pruning GroupTaylor | 3.00 (3.00 to 3.00) |",
    ]
    quality = section((folder / "README.md").read_text(), "quality")
    assert "256 calibration samples" in quality
    assert rows(quality) == ["| Torch-Pruning `GroupTaylor`, its defaults | **3.00** |"]


@pytest.mark.parametrize(
    ("condition", "title"),
    [("seq_len", "2048 tokens"), ("eval_windows", "all windows"), ("max_questions", "50 questions a task")],
)
def test_different_conditions_share_no_table(condition: str, title: str, tmp_path: Path) -> None:
    usual = {"num_samples": 128, "seq_len": 128, "eval_windows": 64, "max_questions": None}
    other = {"seq_len": 2048, "eval_windows": None, "max_questions": 50}[condition]
    for run, conditions, value in (("1", usual, 7.0), ("2", {**usual, condition: other}, 3.0)):
        extra = {"ratio": 0.2, "seed": 0, "perplexity": value, "perplexity_dense": 2.0, "kept": 0.8, **conditions}
        append(made("quality", MODELS[0], "gradprune group_fisher T=0", shape="20%", extra=extra, run=run), tmp_path)
        append(made("calibration_size", "smol", "FLAP", shape="20%", extra=extra, run=run), tmp_path)
    text = (rebuild(tmp_path, tmp_path / "report") / "benchmarks/README.md").read_text()
    assert rows(text.split(f"#### {MODELS[0]}, {title}, dense")[1].split("###")[0]) == [
        "| gradprune group_fisher T=0 | 3.00 (3.00 to 3.00) |"
    ]
    assert f"| smol, {title} | 20% | FLAP | 0.405 |" in text
    # The README shows the latest measurement.
    assert "**3.00**" in (tmp_path / "report/README.md").read_text()


def test_providers_that_keep_more_than_the_others_are_marked(tmp_path: Path) -> None:
    for provider, ratio, kept in (("obs", 0.2, 0.8), ("FLAP", 0.2, 0.805), ("obs", 0.5, 0.5), ("LLM-Pruner", 0.5, 0.6)):
        extra = {"ratio": ratio, "seed": 0, "perplexity": 3.0, "perplexity_dense": 2.0, "kept": kept}
        append(made("quality", "smol", provider, shape=f"{ratio}", extra=extra), tmp_path)
    assert rows((rebuild(tmp_path, tmp_path / "report") / "benchmarks/README.md").read_text()) == [
        "| obs | 3.00 (3.00 to 3.00) | 3.00 (3.00 to 3.00) |",
        "| FLAP | 3.00 (3.00 to 3.00) | - |",
        "| LLM-Pruner | - | 3.00 (3.00 to 3.00), 60% kept |",
    ]


def test_an_exponent_is_fitted_to_a_single_run(tmp_path: Path) -> None:
    for run, size, each, points in (("1", "28M", 8.0, (64, 256)), ("2", "3M", 1.0, (64, 128))):
        for x in points:
            shape, extra = f"Llama {size}, 1x{x} tokens by 1", {"axis": "tokens", "x": x}
            found = made(
                "job", "growth with tokens", "plain", each * x, shape=shape, run=run, extra=extra, peak_memory=x
            )
            append(found, tmp_path)
    text = (rebuild(tmp_path, tmp_path / "report") / "benchmarks/README.md").read_text()
    assert "| tokens, 64 to 128 | plain | 1.00 | 1.00 |" in text


def test_the_claim_states_time_and_memory_relative_to_torch_pruning(tmp_path: Path) -> None:
    for provider, milliseconds, peak in (("gradprune cpp", 100.0, 150), ("torch-pruning GroupTaylor", 160.0, 200)):
        values = {"peak_memory": peak, "extra": {"weight_bytes": 1}}
        append(made("job", "calibration", provider, milliseconds, **values), tmp_path / "results")
    claim = section((rebuild(tmp_path / "results", tmp_path) / "README.md").read_text(), "claim")
    assert "1.6 times as fast as Torch-Pruning's `GroupTaylorImportance` in 75% of its memory" in claim


def test_the_methods_page_shows_what_repairing_experts_gains(results: Path, tmp_path: Path) -> None:
    page = (rebuild(results, tmp_path / "report") / "docs" / "methods.md").read_text()
    assert rows(section(page, "experts")) == ["| mixture: experts 30%, 4 samples | 5.000 | 6.000 | 5.250 |"]


def test_the_methods_page_shows_the_mean_excess_by_the_number_of_samples(results: Path, tmp_path: Path) -> None:
    page = (rebuild(results, tmp_path / "report") / "docs" / "methods.md").read_text()
    assert rows(section(page, "calibration_size")) == ["| smol | 50% | FLAP | 2.500 | 1.000 |"]


def test_the_guide_shows_when_h_gsp_and_scaling_help(results: Path, tmp_path: Path) -> None:
    guide = (rebuild(results, tmp_path / "report") / "docs" / "gradient-vanishing.md").read_text()
    # Each method has two models; a difference that is too small for the tables counts as none.
    assert rows(section(guide, "temperature")) == [
        "| `taylor` | 0 | 1 | 1 |",
        "| `fisher` | 2 | 0 | 0 |",
        "| `magnitude` | 0 | 0 | 2 |",
        "| all | 2 | 1 | 3 |",
    ]
    assert rows(section(guide, "scalings")) == [
        "| `none` | **9.50** | 10.50 | **9.50** | 11.50 |",
        "| `adaptive` | 10.50 | **9.50** | 11.50 | **9.50** |",
    ]


def test_the_readme_says_if_nothing_has_been_measured(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    readme = (rebuild(tmp_path / "results", tmp_path) / "README.md").read_text()
    assert readme.count("Nothing has been measured yet.") == 3


def test_only_the_sections_change(results: Path, tmp_path: Path) -> None:
    text = (rebuild(results, tmp_path / "report") / "README.md").read_text()
    assert text.startswith("# A project\n\n<!-- results: claim -->\n**gradprune")
    assert text.endswith("<!-- end -->\n\nAfter.\n")


@pytest.mark.parametrize("text", ["nothing", text_with("ops", "ops"), "<!-- results: ops -->\nno end"])
def test_a_text_without_its_section_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match="results: ops"):
        replace_sections(tmp_path / "README.md", {"ops": "text"})
    assert (tmp_path / "README.md").read_text() == text


def test_an_exponent_is_the_slope_of_the_logarithms() -> None:
    assert exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    assert exponent([1, 2], [5.0, 5.0]) == pytest.approx(0.0)
    assert str(exponent([1], [5.0])) == "nan"
