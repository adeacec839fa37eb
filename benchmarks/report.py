"""Rebuild benchmarks/README.md, the plots and the result sections of other documents from benchmarks/results.

    python -m benchmarks.report [--results FOLDER] [--root FOLDER]

The same results always give the same bytes. Each case is shown by its latest run. The long tables are only in
benchmarks/README.md; README.md and the guide get the short ones of `benchmarks.summary`.
"""

import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import plots, summary, tables
from benchmarks.environment import ROOT
from benchmarks.results import ANY_HARDWARE, FOLDER, Record, latest, read

PICTURE = "perplexity-against-size.svg"
_INTRODUCTION = Path(__file__).with_name("introduction.md")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the repository whose documents and plots are rewritten"
    )
    options = parser.parse_args(arguments)
    records = latest(read(options.results))
    folder = options.root / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(report(records, folder / "plots"), encoding="utf-8")
    shown = summary.of_shown_model(records)
    plots.size_plot(summary.mean_sizes(shown), summary.QUALITY, folder / "plots" / PICTURE)
    for name, sections in summary.SECTIONS.items():
        replace_sections(options.root / name, {section: made(records) for section, made in sections.items()})


def report(records: Sequence[Record], plots_folder: Path) -> str:
    """Return the text of benchmarks/README.md, and replace the plots in `plots_folder`."""
    for old in plots_folder.glob("*.svg"):
        old.unlink()
    parts = [_INTRODUCTION.read_text(encoding="utf-8")]
    for hardware, of_one in _by_hardware(records).items():
        parts.append(f"## {hardware.capitalize() if hardware == ANY_HARDWARE else hardware}\n\n{_environments(of_one)}")
        for kind, section in _SECTIONS.items():
            chosen = [found for found in of_one if found.kind == kind]
            if chosen:
                parts.append(section(chosen, plots_folder))
        predicted = [found for found in of_one if found.kind == "predicted"]
        if predicted:
            measured = [found for found in of_one if found.kind != "predicted"]
            table = tables.predicted_table(predicted, measured)
            parts.append(f"### Predicted beside measured\n\n{tables.PREDICTED}\n\n{table}")
    if not records:
        parts.append("No results have been recorded yet.")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def replace_sections(file: Path, texts: Mapping[str, str]) -> None:
    """Put each text between the lines `<!-- results: NAME -->` and `<!-- end -->` of `file`.

    Raises:
        ValueError: the first line of a section does not occur exactly once, or no end follows it.
    """
    content = file.read_text(encoding="utf-8")
    for name, text in texts.items():
        begin, end = f"<!-- results: {name} -->\n", "<!-- end -->"
        before, *rest = content.split(begin)
        if len(rest) != 1 or end not in rest[0]:
            raise ValueError(f"{file}: needs the line '{begin.strip()}' once, and '{end}' after it")
        content = f"{before}{begin}{text.strip()}\n{end}{rest[0].split(end, 1)[1]}"
    file.write_text(content, encoding="utf-8")


def _by_hardware(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records grouped by hardware; those that do not depend on it come last."""
    groups = tables.grouped(records, lambda found: found.hardware)
    return dict(sorted(groups.items(), key=lambda group: group[0] == ANY_HARDWARE))


def _environments(records: Sequence[Record]) -> str:
    """The distinct environments of the records, one line each."""
    lines = []
    for found in records:
        e = found.environment
        versions = f"torch {e.torch}, triton {e.triton or 'none'}, transformers {e.transformers}, Python {e.python}"
        driver = f", driver {e.driver}" if e.driver else ""
        line = f"- {versions}{driver}, {e.threads} threads; revision `{e.revision}`"
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def _kernels(records: Sequence[Record], folder: Path) -> str:
    parts = ["### Ops"]
    for name, of_op in tables.grouped(records, lambda found: found.name).items():
        image = ""
        if any(found.ms_p50 is not None for found in of_op):
            image = _plot(plots.kernel_plot, of_op, folder, name)
        parts.append(f"#### {name}\n\n{image}{tables.kernel_table(of_op)}")
    return "\n\n".join(parts)


def _jobs(records: Sequence[Record], folder: Path) -> str:
    parts = ["### Whole jobs"]
    for name, of_job in tables.grouped(records, lambda found: re.split(" with | of ", found.name)[0]).items():
        if name == "calibration":
            text = tables.calibration_table(of_job)
        elif name == "growth":
            of_job = tables.of_last_runs(of_job)
            by_axis = tables.grouped(of_job, lambda found: found.extra["axis"])
            images = [_plot(plots.growth_plot, group, folder, f"growth-{axis}") for axis, group in by_axis.items()]
            text = "".join(images) + tables.growth_table(of_job)
        elif name == "memory":
            text = f"{tables.MEMORY}\n\n{tables.memory_table(of_job)}\n\n{tables.memory_growth_table(of_job)}".strip()
        elif name == "overhead":
            text = f"{tables.OVERHEAD}\n\n{tables.overhead_table(of_job)}"
        elif name == "streamed":
            text = f"{tables.STREAMED}\n\n{tables.streamed_table(of_job)}"
        elif name == "stages":
            text = f"{tables.STAGES}\n\n{tables.stages_table(of_job)}"
        elif name == "whole":
            text = f"{tables.WHOLE}\n\n{tables.whole_table(of_job)}"
        elif name == "profile":
            text = tables.profile_table(of_job)
        else:
            text = tables.timing_table(of_job)
        parts.append(f"#### {name}\n\n{text}")
    return "\n\n".join(parts)


def _quality(records: Sequence[Record], folder: Path) -> str:
    parts = ["### Quality", "Held-out perplexity: mean over seeds (lowest to highest). T is the H-GSP temperature."]
    measured = [found for found in records if "perplexity" in found.extra]
    for name, of_model in tables.by_model(measured).items():
        dense = of_model[0].extra["perplexity_dense"]
        image = _plot(plots.quality_plot, of_model, folder, f"quality-{name}")
        title = f"#### {name}, dense {dense:.2f}{tables.dense_accuracy(of_model)}"
        parts.append(f"{title}\n\n{image}{tables.quality_table(of_model)}")
    return "\n\n".join(parts)


def _calibration_size(records: Sequence[Record], _folder: Path) -> str:
    return f"### Calibration samples\n\n{tables.CALIBRATION_SIZE}\n\n{tables.calibration_size_table(records)}"


def _distilled_text(records: Sequence[Record], _folder: Path) -> str:
    return f"### The text's share in distillation\n\n{tables.DISTILLED_TEXT}\n\n{tables.distilled_text_table(records)}"


def _recovery(records: Sequence[Record], _folder: Path) -> str:
    return f"### Recovery\n\n{tables.RECOVERY}\n\n{tables.recovery_table(records)}"


def _inference(records: Sequence[Record], _folder: Path) -> str:
    return f"### Inference\n\n{tables.inference_table(records)}"


def _vanishing(records: Sequence[Record], _folder: Path) -> str:
    lead = tables.VANISHING.format(records[0].shape)
    return f"### Vanishing gradients\n\n{lead}\n\n{tables.vanishing_table(records)}"


def _experts(records: Sequence[Record], _folder: Path) -> str:
    return f"### Repair of experts\n\n{tables.EXPERTS}\n\n{tables.experts_table(records)}"


def _compiled(records: Sequence[Record], _folder: Path) -> str:
    return f"### Compiled kernels\n\n{tables.COMPILED}\n\n{tables.compiled_table(records)}"


_SECTIONS: dict[str, Callable[[Sequence[Record], Path], str]] = {
    "kernel": _kernels,
    "job": _jobs,
    "quality": _quality,
    "calibration_size": _calibration_size,
    "distilled_text": _distilled_text,
    "recovery": _recovery,
    "inference": _inference,
    "vanishing": _vanishing,
    "experts": _experts,
    "compiled": _compiled,
}


def _plot(draw: Callable[[Sequence[Record], Path], None], records: Sequence[Record], folder: Path, name: str) -> str:
    """Draw a plot, and return the Markdown that shows it."""
    hardware = records[0].hardware.removesuffix(ANY_HARDWARE)
    file = re.sub(r"[^a-z0-9]+", "-", f"{name} {hardware}".lower()).strip("-") + ".svg"
    draw(records, folder / file)
    return f"![{name}]({folder.name}/{file})\n\n"


if __name__ == "__main__":
    main()
