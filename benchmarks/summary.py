"""The few figures that README.md and the guide show: at most `MOST_ROWS` rows per table, each from a record.

README.md shows only what anyone can reproduce: results of random models, the demo model, and models made from it.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean

from benchmarks import tables
from benchmarks.jobs import plan_table
from benchmarks.jobs.calibrators import RECOMPUTING
from benchmarks.jobs.memory import HELD_OUT
from benchmarks.results import Record, percent
from gradprune.config import DEFAULT_METHODS

MOST_ROWS = 7
PEER = "torch-pruning GroupTaylor"
# README.md shows the first of these models that has results.
MODELS = ("demo, KV heads repeated", "demo")
_DEFAULT = DEFAULT_METHODS[0]
# The providers that README.md shows, best settings first, with the names it gives them.
QUALITY = {
    "gradprune search + least squares": "`gradprune search`",
    f"gradprune {_DEFAULT} + distillation T=0": f"`gradprune prune` (`{_DEFAULT}`, repaired, distilled)",
    f"gradprune {_DEFAULT} + least squares T=0": f"`{_DEFAULT}`, repaired",
    "gradprune group_fisher + least squares T=0": "`group_fisher`, repaired",
    "gradprune group_fisher T=0": "`group_fisher`, not repaired",
    "gradprune magnitude T=0": "`magnitude`, not repaired",
    PEER: "Torch-Pruning `GroupTaylor`, its defaults",
}
_DEEP_MODELS = ("deep healthy", "deep suffering")
_UNMEASURED = "Nothing has been measured yet."


def claim(records: Sequence[Record]) -> str:
    """README.md's first sentence: what the project is, and how calibration compares with Torch-Pruning's."""
    what = (
        "**gradprune makes large language models smaller and faster: it removes whole KV groups and MLP channels, "
        "chosen by gradient importance over the whole model"
    )
    job = _calibration_job(records)
    ours, peer = _best_of_ours(job), _provider(job, PEER)
    if ours is None or peer is None or not (ours.ms_p50 and peer.ms_p50 and ours.peak_memory and peer.peak_memory):
        return f"{what}.**"
    return (
        f"{what}, and scores them {peer.ms_p50 / ours.ms_p50:.1f} times as fast as Torch-Pruning's "
        f"`GroupTaylorImportance` in {ours.peak_memory / peer.peak_memory:.0%} of its memory** "
        f"(peak memory beyond the weights; {_in_words(ours.shape)}, {ours.dtype}, on {ours.hardware})."
    )


def ops(records: Sequence[Record]) -> str:
    """Table of one case per op: this project's fastest backend against the floor, eager PyTorch and torch.compile.

    All cases are in one dtype, bf16 on a GPU and fp32 on a CPU. Each op is shown by the largest case for which
    torch.compile was timed; if there is none, by the largest.
    """
    shown = _on_one_machine([found for found in records if found.kind == "kernel"])
    dtype = "bf16" if shown and shown[0].environment.device == "cuda" else "fp32"
    rows = []
    for name, group in tables.grouped([found for found in shown if found.dtype == dtype], lambda f: f.name).items():
        cases = list(tables.grouped(group, lambda found: found.shape).values())
        timed = [(case, ours) for case in cases if (ours := _best_of_ours(case)) is not None]
        if not timed:
            continue
        case, ours = max(
            timed, key=lambda pair: (_time(pair[0], "torch.compile") is not None, pair[1].flops or pair[1].bytes or 0)
        )
        rows.append(
            [
                f"`{name}`, {ours.extra.get('label', '')} {ours.shape}",
                f"{ours.tflops:.2f} TFLOP/s" if ours.tflops is not None else f"{ours.gb_per_s:.1f} GB/s",
                "-" if ours.percent_of_floor is None else f"{ours.percent_of_floor:.0f}",
                *(tables.ratio(_time(case, peer), ours.ms_p50) for peer in ("eager", "torch.compile", "foreach")),
            ]
        )
    if not rows:
        return _UNMEASURED
    header = [f"op ({dtype})", "rate", "% of floor (copy or `torch.mm`)", "x eager", "x torch.compile", "x foreach"]
    return f"Ops, by the fastest backend, {_machine(shown)}\n\n{tables.table(header, rows[:MOST_ROWS])}"


def calibration(records: Sequence[Record]) -> str:
    """Table of all providers' time and memory in the job of `_calibration_job`, relative to this project's fastest."""
    job = _calibration_job(records)
    ours = _best_of_ours(job)
    if ours is None:
        return _UNMEASURED
    others = (f"{ours.provider}{RECOMPUTING}", "plain", PEER, "torch-pruning GroupHessian", "naive", "torch.func")
    shown = [ours, *(found for other in others if (found := _provider(job, other)) is not None)]
    rows = [
        [
            found.provider,
            tables.ratio(found.ms_p50, ours.ms_p50) if found.ms_p50 else (found.error or "-").split(":")[0],
            tables.ratio(found.peak_memory, ours.peak_memory),
            tables.above_activations(found, job),
        ]
        for found in shown[:MOST_ROWS]
    ]
    job_in_words = f"{_in_words(ours.shape)}, {ours.dtype}"
    header = [job_in_words, "time, x ours", "peak memory, x ours", tables.BEYOND_ACTIVATIONS]
    return f"Calibration and importance of a random model, {_machine(job)}\n\n{tables.table(header, rows)}"


def quality(records: Sequence[Record]) -> str:
    """Table of mean held-out perplexity of `QUALITY` on one model that anyone can rebuild; the lowest is in bold."""
    of_model = of_shown_model(records)
    if not of_model:
        return _UNMEASURED
    means = mean_perplexities(of_model)
    ratios = sorted({found.extra["ratio"] for found in of_model if found.provider in QUALITY})
    rows = []
    for provider, name in QUALITY.items():
        if any(key[0] == provider for key in means):
            cells = [_cell(means.get((provider, ratio)), _lowest(means, ratio)) for ratio in ratios]
            rows.append([name, *cells])
    seeds = len({found.extra["seed"] for found in of_model if found.provider in QUALITY})
    of_seeds = f"mean over {seeds} seeds" if seeds > 1 else "one seed"
    dense, samples = of_model[0].extra["perplexity_dense"], of_model[0].extra["num_samples"]
    lead = f"Held-out perplexity, {of_seeds}, {samples} calibration samples; {of_model[0].name}, dense {dense:.2f}:"
    return f"{lead}\n\n{tables.table(['', *(f'{percent(r)} removed' for r in ratios)], rows[:MOST_ROWS])}"


def temperature(records: Sequence[Record]) -> str:
    """Table of how many cases (model, ratio, conditions) of each repaired method had lower perplexity with H-GSP."""
    repaired = [f for f in records if f.kind == "quality" and " + least squares T=" in f.provider]
    counts: dict[str, Counter[str]] = {}
    for (method, *_), group in tables.grouped(
        repaired, lambda found: (found.provider.split()[1], found.name, found.extra["ratio"], found.conditions)
    ).items():
        values = {t: [f.extra["perplexity"] for f in group if f.provider.endswith(t)] for t in ("T=0", "T=1")}
        if all(values.values()):
            # Rounded as the tables show them: a difference in the third decimal place counts as none.
            without, with_it = (round(fmean(of_one), 2) for of_one in values.values())
            outcome = "equal" if with_it == without else "lower" if with_it < without else "higher"
            counts.setdefault(method, Counter())[outcome] += 1
    if not counts:
        return _UNMEASURED
    outcomes = ("lower", "equal", "higher")
    rows = [[f"`{method}`", *(str(found[outcome]) for outcome in outcomes)] for method, found in counts.items()]
    rows.append(["all", *(str(sum(found[outcome] for found in counts.values())) for outcome in outcomes)])
    header = ["perplexity with T=1, repaired", *outcomes]
    return tables.table(header, rows)


def scalings(records: Sequence[Record]) -> str:
    """Table of perplexity by gradient scaling, on the healthy deep model and on the one with vanishing gradients."""
    chosen = [found for found in records if found.kind == "vanishing" and found.name in _DEEP_MODELS]
    if not chosen:
        return _UNMEASURED
    columns = list(tables.grouped(chosen, lambda found: (found.extra["temperature"], found.name)))
    columns.sort()
    rows = []
    for fix, group in tables.grouped(chosen, lambda found: found.extra["gradient_fix"]).items():
        by_column = {(found.extra["temperature"], found.name): found.extra["perplexity"] for found in group}
        lowest = [
            min(f.extra["perplexity"] for f in chosen if (f.extra["temperature"], f.name) == column)
            for column in columns
        ]
        rows.append([f"`{fix}`", *(_cell(by_column.get(c), low) for c, low in zip(columns, lowest, strict=True))])
    return tables.table(["`--gradient_fix`", *(f"{name}, T={t:g}" for t, name in columns)], rows)


def calibration_size(records: Sequence[Record]) -> str:
    """Table of excess log perplexity by the number of calibration samples."""
    chosen = [found for found in records if found.kind == "calibration_size"]
    return f"{tables.CALIBRATION_SIZE}\n\n{tables.calibration_size_table(chosen)}" if chosen else _UNMEASURED


def experts(records: Sequence[Record]) -> str:
    """Table of the perplexity of a mixture of experts by repair."""
    chosen = [found for found in records if found.kind == "experts" and found.name == "mixture"]
    return tables.experts_table(chosen) if chosen else _UNMEASURED


def distilled_text(records: Sequence[Record]) -> str:
    """Table of what the text's share in distillation gains and costs."""
    chosen = [found for found in records if found.kind == "distilled_text"]
    return f"{tables.DISTILLED_TEXT}\n\n{tables.distilled_text_table(chosen)}" if chosen else _UNMEASURED


def recovery(records: Sequence[Record]) -> str:
    """A sentence and a table per model: how much recovery restores, and how much training that took."""
    recoveries = [found for found in records if found.kind == "recovery"]
    groups = tables.grouped(recoveries, lambda found: (found.work, found.conditions))
    parts = []
    for group in groups.values():
        recovered, share = _provider(group, "recovered"), tables.way_back(group)
        if recovered is None or share is None:
            continue
        extra = recovered.extra
        parts.append(
            f"{recovered.name} with {recovered.shape}, repaired: {extra['steps']} steps, {extra['tokens']:,} tokens "
            f"and {extra['processor_seconds'] / 60:.0f} minutes of processor time ({recovered.environment.hardware}) "
            f"bring log perplexity {share:.0%} of the way back to the dense model's (`python -m "
            f"benchmarks.quality.recovery`; measured on {extra['eval_windows'] or 'all'} windows and "
            f"{extra['max_questions'] or 'all'} questions per task):\n\n"
            f"{tables.recovery_table(group)}"
        )
    return "\n\n".join(parts) or _UNMEASURED


def of_shown_model(records: Sequence[Record]) -> list[Record]:
    """Return the records of perplexity of the model that README.md shows, all measured under the same conditions."""
    measured = [found for found in records if found.kind == "quality" and "perplexity" in found.extra]
    by_model = tables.grouped(measured, lambda found: found.name)
    of_model = next((by_model[name] for name in MODELS if name in by_model), [])
    by_conditions = tables.grouped(of_model, lambda found: found.conditions).values()
    # Results under different conditions are not comparable; those measured last are shown.
    return max(by_conditions, key=lambda group: max(found.run for found in group), default=[])


def mean_perplexities(records: Sequence[Record]) -> dict[tuple[str, float], float]:
    """Mean perplexity over seeds, by provider and ratio."""
    groups = tables.grouped(records, lambda found: (found.provider, found.extra["ratio"]))
    return {key: fmean(found.extra["perplexity"] for found in seeds) for key, seeds in groups.items()}


def mean_sizes(records: Sequence[Record]) -> dict[str, list[tuple[float, float]]]:
    """(fraction of the parameters kept, perplexity) by shown provider, the dense model first; means over seeds."""
    points: dict[str, list[tuple[float, float]]] = {}
    groups = tables.grouped(records, lambda found: (found.provider, found.extra["ratio"]))
    for (provider, _), seeds in sorted(groups.items()):
        if provider in QUALITY:
            dense = (1.0, seeds[0].extra["perplexity_dense"])
            means = (fmean(found.extra[value] for found in seeds) for value in ("kept", "perplexity"))
            points.setdefault(provider, [dense]).append(tuple(means))
    return points


def plan(_records: Sequence[Record]) -> str:
    """Table of how large models fit on GPUs; computed, not measured."""
    lead = (
        "As `gradprune plan` predicts for 128 samples of 2048 tokens at batch size 1: the fastest way to run that fits "
        "each device, and its peak memory there; in the last columns, the host memory that a streamed run needs and "
        "the amount of data that it reads."
    )
    return f"{lead}\n\n{tables.table(*plan_table.rows())}"


def streaming(records: Sequence[Record]) -> str:
    """What streaming costs for a model that would fit, how well the plan predicts, and how time and memory grow."""
    overhead, memory = (
        _on_one_machine([found for found in records if found.kind == "job" and found.name.startswith(name)])
        for name in ("overhead ", "memory ")
    )
    growth = tables.memory_growth_table(memory)
    parts = [_overhead(overhead), _predictions(memory), f"{_GROWTH}\n\n{growth}" if growth else ""]
    return "\n\n".join(filter(None, parts)) or _UNMEASURED


def _overhead(records: Sequence[Record]) -> str:
    if not records:
        return ""
    least, most = (pick(found.extra["ratio"] for found in records) for pick in (min, max))
    return (
        f"Calibrating {records[0].shape.split(',')[0]}, which fits in memory, takes {least:.2f} to {most:.2f} times as "
        "much processor time with streamed layers as with the whole model and `--use_gradient_checkpointing` (`python "
        "-m benchmarks.jobs.overhead`)."
    )


def _predictions(records: Sequence[Record]) -> str:
    """Sentence on predicted / measured peaks, for the shapes that the plan's constants were set on and for another."""
    texts = []
    compared = [found for found in records if not found.extra["axis"] and found.peak_memory]
    held_out = f" layers of {HELD_OUT.hidden} and {HELD_OUT.intermediate},"
    for known, which in ((True, "the shapes that its constants were set on"), (False, "one that they were not set on")):
        chosen = [found for found in compared if known != (held_out in found.shape)]
        ratios = [found.extra["predicted"] / (found.peak_memory or 1) for found in chosen]
        if ratios:
            texts.append(f"{min(ratios):.2f} to {max(ratios):.2f} times the measured peak for {which}")
    return f"The plan predicts {', and '.join(texts)}." if texts else ""


_GROWTH = (
    "How the processor time and peak memory of calibration, of importance by `obs` and of repair grow, as exponents "
    "(1 is linear, 0 constant), for a small Llama at batch size 1. Streamed runs have 10 MiB for streams; of several "
    "ranks, the largest value counts (`python -m benchmarks.jobs.memory`):"
)

SECTIONS: dict[str, dict[str, Callable[[Sequence[Record]], str]]] = {
    "README.md": {"claim": claim, "quality": quality, "calibration": calibration, "ops": ops},
    "docs/gradient-vanishing.md": {"temperature": temperature, "scalings": scalings},
    "docs/methods.md": {"distilled_text": distilled_text, "calibration_size": calibration_size, "experts": experts},
    "docs/serving.md": {"recovery": recovery},
    "docs/large-models.md": {"plan": plan, "streaming": streaming},
}
"""The generated sections of each file of the repository, by name, and the functions that write them."""


def _in_words(shape: str) -> str:
    """Spell out the size of a calibration in a record's shape, such as "4x128 tokens by 2"."""
    return re.sub(r"(\d+)x(\d+) tokens by (\d+)", r"\1 samples of \2 tokens, batch size \3", shape)


def _calibration_job(records: Sequence[Record]) -> list[Record]:
    """Records of calibrating the largest model that `PEER` was timed on; if there is none, the largest model."""
    shown = _on_one_machine([found for found in records if found.kind == "job" and found.name == "calibration"])
    jobs = [job for job in tables.grouped(shown, lambda found: found.work).values() if _best_of_ours(job)]
    return max(
        jobs,
        key=lambda job: (_time(job, PEER) is not None, max(found.extra.get("weight_bytes", 0) for found in job)),
        default=[],
    )


def _on_one_machine(records: Sequence[Record]) -> list[Record]:
    """The records of one machine: a GPU if there is one, otherwise the one that measured last."""
    machines = tables.grouped(records, lambda found: found.hardware).values()
    return max(machines, key=lambda of_one: (of_one[0].environment.device == "cuda", of_one[-1].run), default=[])


def _machine(records: Sequence[Record]) -> str:
    revisions = ", ".join(sorted({f"`{found.environment.revision}`" for found in records}))
    return f"on {records[0].hardware} (torch {records[0].environment.torch}; revision {revisions}):"


def _best_of_ours(records: Sequence[Record]) -> Record | None:
    ours = [found for found in records if found.provider.startswith("gradprune") and found.ms_p50 is not None]
    return min(ours, key=lambda found: found.ms_p50 or 0.0, default=None)


def _provider(records: Sequence[Record], name: str) -> Record | None:
    return next((found for found in records if found.provider == name), None)


def _time(records: Sequence[Record], provider: str) -> float | None:
    found = _provider(records, provider)
    return found and found.ms_p50


def _lowest(means: dict[tuple[str, float], float], ratio: float) -> float:
    return min(value for (provider, of), value in means.items() if of == ratio and provider in QUALITY)


def _cell(value: float | None, lowest: float) -> str:
    if value is None:
        return "-"
    return f"**{value:.2f}**" if f"{value:.2f}" == f"{lowest:.2f}" else f"{value:.2f}"
