"""Rebuild benchmarks/README.md, its plots, and README.md's section on results, from benchmarks/results alone.

    python -m benchmarks.report [--results FOLDER] [--output FOLDER] [--readme FILE]

The same results make the same bytes. Of each piece of work the latest run is shown.
"""

import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import plots, tables
from benchmarks.environment import ROOT
from benchmarks.results import ANY_HARDWARE, FOLDER, Record, latest, read
from benchmarks.summary import by_hardware, summary

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

_HOW = """# Benchmarks

Made by `python -m benchmarks.report` from the records in [results](results); no figure is written by hand.

`make bench` measures on the CPU (`QUICK=1` in under three minutes), `make gpu` on a GPU. One benchmark at a time:
`python -m benchmarks.kernels.run`, `benchmarks.jobs.calibration`, `benchmarks.jobs.growth`,
`benchmarks.jobs.score_select_cut`, `benchmarks.inference.speed`, `benchmarks.quality.methods`, each with `--device`,
`--quick` and `--help`. `python -m benchmarks.compare A B` shows what changed between two files, folders or revisions.

## How it is measured

- All providers of one piece of work take turns within one run, on the same inputs, threads and element type; p20, p50
  and p80 are over the turns. Ratios are between medians of one run.
- A result is checked against the reference first; a wrong one is recorded as an error and not timed. Running out of
  memory, or of time, is a result too. Nothing is timed under Triton's interpreter.
- Ops: on the CPU every turn takes the next of several input sets that together exceed the last-level cache, after all
  cores read other memory for 10 ms; on a GPU the L2 cache is overwritten before each turn and events time the turn.
  GB/s counts the bytes that must be moved at least.
- The floor is a copy of as many bytes, or for `linear_importance` the plain weight gradient as one `torch.mm` (on the
  CPU in the inputs' type and in fp32, whichever is faster).
- torch.compile: `fullgraph=True`, this very shape, on a GPU `max-autotune-no-cudagraphs`; compiled before the first
  turn.
- Calibration: `plain` is forward and `loss.backward()`; `naive` keeps gradients and a second buffer of g², scores
  eagerly and reads statistics with `.item()`; Torch-Pruning runs its `GroupTaylorImportance` and
  `GroupHessianImportance` as its documentation shows, with eager attention, because it traces no other, and its time
  includes its graph (also recorded alone); `torch.func` is `vmap(grad)` over the prunable weights. `recomputing` is
  this project with `use_gradient_checkpointing`. All after a warm-up; on a GPU, where recomputation of activations is
  on, it is on for all but `torch.func`. `torch.func` and this project compute every sample's own scores, the others
  those of batches, except `GroupHessianImportance`, which is not checked: its accumulator keeps only the last sample.
- Peak memory is what tensors need above the loaded model: on a GPU `torch.cuda.max_memory_allocated`, on the CPU the
  resident memory of a process of its own, with every tensor from 64 KiB on a mapping of its own (glibc's
  `M_MMAP_THRESHOLD`). What glibc's heap holds of freed tensors beside that, in the timed turns, stands in the last
  column. `forward` makes the loss and its graph and goes no further: its peak is that of the activations, and what
  others need beyond it is shown beside the size of the weights. Growth is shown with the heap's slack.
- Quality: Torch-Pruning gets the same samples; its lowest groups of each layer go, by its default, and are cut by
  this project's surgery, up to the same number of removed parameters.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder of README.md and plots/")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="whose section is replaced")
    options = parser.parse_args(arguments)
    records = latest(read(options.results))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "README.md").write_text(report(records, options.output / "plots"), encoding="utf-8")
    replace_section(options.readme, summary(records))


def report(records: Sequence[Record], plots_folder: Path) -> str:
    """The text of benchmarks/README.md; writes its plots."""
    for old in plots_folder.glob("*.svg"):
        old.unlink()
    parts = [_HOW]
    for hardware, of_one in by_hardware(records).items():
        parts.append(f"## {hardware.capitalize() if hardware == ANY_HARDWARE else hardware}\n\n{_environments(of_one)}")
        for kind, section in _SECTIONS.items():
            chosen = [found for found in of_one if found.kind == kind]
            if chosen:
                parts.append(section(chosen, plots_folder))
    if not records:
        parts.append("No results have been recorded yet.")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def replace_section(readme: Path, text: str) -> None:
    """Put `text` between the markers of `readme`.

    Raises:
        ValueError: the markers are not there, once each.
    """
    old = readme.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        raise ValueError(f"{readme}: needs the lines '{BEGIN}' and '{END}' once each")
    before, rest = old.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{text.strip()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def _environments(records: Sequence[Record]) -> str:
    """What the records ran on, one line a difference."""
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
    for name, of_job in tables.grouped(records, lambda found: found.name.split(" with ")[0]).items():
        if name == "calibration":
            text = tables.calibration_table(of_job)
        elif name == "growth":
            by_axis = tables.grouped(of_job, lambda found: found.extra["axis"])
            images = [_plot(plots.growth_plot, group, folder, f"growth-{axis}") for axis, group in by_axis.items()]
            text = "".join(images) + tables.growth_table(of_job)
        else:
            text = tables.timing_table(of_job)
        parts.append(f"#### {name}\n\n{text}")
    return "\n\n".join(parts)


def _quality(records: Sequence[Record], folder: Path) -> str:
    parts = ["### Quality", "Held-out perplexity: mean over seeds (lowest to highest). T is the H-GSP temperature."]
    measured = [found for found in records if "perplexity" in found.extra]
    for name, of_model in tables.grouped(measured, lambda found: found.name).items():
        dense = of_model[0].extra["perplexity_dense"]
        image = _plot(plots.quality_plot, of_model, folder, f"quality-{name}")
        parts.append(f"#### {name}, dense {dense:.2f}\n\n{image}{tables.quality_table(of_model)}")
    return "\n\n".join(parts)


def _inference(records: Sequence[Record], _folder: Path) -> str:
    return f"### Inference\n\n{tables.inference_table(records)}"


def _vanishing(records: Sequence[Record], _folder: Path) -> str:
    lead = tables.VANISHING.format(records[0].shape)
    return f"### Vanishing gradients and their repairs\n\n{lead}\n\n{tables.vanishing_table(records)}"


_SECTIONS: dict[str, Callable[[Sequence[Record], Path], str]] = {
    "kernel": _kernels,
    "job": _jobs,
    "quality": _quality,
    "inference": _inference,
    "vanishing": _vanishing,
}


def _plot(draw: Callable[[Sequence[Record], Path], None], records: Sequence[Record], folder: Path, name: str) -> str:
    """Draw, and return the Markdown that shows it."""
    hardware = records[0].hardware.removesuffix(ANY_HARDWARE)
    file = re.sub(r"[^a-z0-9]+", "-", f"{name} {hardware}".lower()).strip("-") + ".svg"
    draw(records, folder / file)
    return f"![{name}]({folder.name}/{file})\n\n"


if __name__ == "__main__":
    main()
