"""The plots of the benchmarks: different things look different, and numbers are readable."""

import re
from pathlib import Path

import pytest

from benchmarks import plots
from benchmarks.results import Record
from gradprune.config import METHODS
from helpers.benchmark_records import made


def quality(provider: str, perplexity: float) -> list[Record]:
    return [
        made("quality", "a model", provider, extra={"ratio": ratio, "kept": 1.0 - ratio, "perplexity": perplexity})
        for ratio in (0.1, 0.2)
    ]


def test_no_two_methods_look_alike(tmp_path: Path) -> None:
    methods = [method for method in METHODS if method != "reap"]
    records = [
        record for place, method in enumerate(methods) for record in quality(f"gradprune {method} T=0", 9 + place)
    ]
    plots.quality_plot(records, tmp_path / "a.svg")
    strokes = set(
        re.findall(r"stroke: (#\w{6}); stroke-linecap: round|stroke: (#\w{6})", (tmp_path / "a.svg").read_text())
    )
    colors = {one or other for one, other in strokes} - {"#000000", "#b0b0b0", "#cccccc"}
    assert len(colors) == len(methods)


def test_panels_side_by_side_have_the_same_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    finish = plots._finish

    def watched(figure, axes, label, path):
        finish(figure, axes, label, path)
        limits.extend(axis.get_ylim() for axis in axes)

    monkeypatch.setattr(plots, "_finish", watched)
    plots.quality_plot(
        quality("gradprune obs T=0", 100.0) + quality("gradprune obs T=1", 9.0) + quality("gradprune taylor T=1", 8.0),
        tmp_path / "a.svg",
    )
    assert len(limits) == 2
    assert limits[0] == limits[1]


def test_the_axes_of_growth_have_plain_numbers(tmp_path: Path) -> None:
    records = [
        made("job", "a job", "plain", 100.0 * x, peak_memory=x * 2**22, extra={"x": x, "axis": "samples"})
        for x in (1, 2, 4, 8)
    ]
    plots.growth_plot(records, tmp_path / "a.svg")
    texts = re.findall(r"<!-- (.*?) -->", (tmp_path / "a.svg").read_text())
    assert texts[:4] == ["1", "2", "4", "8"]
    assert not [text for text in texts if "$" in text]


def test_two_floors_have_dashes_of_their_own(tmp_path: Path) -> None:
    records = [
        made("kernel", "an op", floor, 1.0, bytes=size, gb_per_s=rate, extra={"floor": True})
        for floor, rate in (("torch.mm", 1.0), ("torch.mm in fp32", 2.0))
        for size in (10**6, 10**7)
    ]
    plots.kernel_plot(records, tmp_path / "a.svg")
    styles = re.findall(r"fill: none; (stroke-dasharray: [^;]*)?.*stroke: #777777", (tmp_path / "a.svg").read_text())
    assert len(set(styles)) == 2
