"""Results as Markdown tables; every number comes from a record."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import TypeVar

from benchmarks.jobs.growth import exponent
from benchmarks.jobs.memory import exponents
from benchmarks.results import CONDITIONS, Record, percent

Key = TypeVar("Key")

BEYOND_ACTIVATIONS = "memory beyond activations, % of weights"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is aligned left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def grouped(records: Iterable[Record], key: Callable[[Record], Key]) -> dict[Key, list[Record]]:
    """Group records by a key, in the order in which the keys first appear."""
    groups: dict[Key, list[Record]] = defaultdict(list)
    for found in records:
        groups[key(found)].append(found)
    return dict(groups)


_IN_WORDS = {
    "num_samples": "samples", "seq_len": "tokens", "eval_windows": "windows", "max_questions": "questions a task"
}  # fmt: skip


def by_model(records: Iterable[Record], shown: Sequence[str] = ()) -> dict[str, list[Record]]:
    """Group quality records by the model's name, with the conditions appended if a model was measured under several.

    Results under different conditions never share a table, except for the conditions in `shown`, which the table itself
    shows.
    """
    names = [name for name in CONDITIONS if name not in shown]
    groups = grouped(records, lambda found: (found.name, tuple(map(found.extra.get, names))))
    values = {model: list(zip(*(of for other, of in groups if other == model), strict=True)) for model, _ in groups}
    named = {}
    for (model, of_group), group in groups.items():
        differing = (
            f"{'all' if value is None else value} {_IN_WORDS[name]}"
            for name, value, others in zip(names, of_group, values[model], strict=True)
            if len(set(others)) > 1
        )
        named[", ".join([model, *differing])] = group
    return named


def kernel_table(records: Sequence[Record]) -> str:
    """Table of one op: one row per case and provider."""
    rows = []
    for found in records:
        rate = found.tflops if found.tflops is not None else found.gb_per_s
        rows.append(
            [
                f"{found.extra.get('label', '')} {found.shape} {found.dtype}".strip(),
                found.provider,
                *_times(found),
                _number(rate, ".2f" if found.tflops is not None else ".1f"),
                _number(found.percent_of_floor, ".0f"),
            ]
        )
    unit = "TFLOP/s" if any(found.tflops is not None for found in records) else "GB/s"
    return table(["case", "provider", "p20 ms", "p50 ms", "p80 ms", unit, "% of floor"], rows)


def calibration_table(records: Sequence[Record]) -> str:
    """One row per model and provider, with ratios to the plain pass of the same run."""
    rows = []
    for group in grouped(records, lambda found: found.work).values():
        plain = next((found for found in group if found.provider == "plain"), None)
        for found in group:
            rows.append(
                [
                    f"{found.shape}, {found.dtype}",
                    found.provider,
                    *_times(found),
                    ratio(found.ms_p50, plain and plain.ms_p50),
                    _number(found.peak_memory, ".1f", 2**20),
                    ratio(found.peak_memory, plain and plain.peak_memory),
                    above_activations(found, group),
                    _number(found.extra.get("peak_resident"), ".1f", 2**20),
                ]
            )
    header = ["job", "provider", "p20 ms", "p50 ms", "p80 ms", "x plain", "peak MiB", "x plain's peak"]
    return table([*header, BEYOND_ACTIVATIONS, "peak MiB in the timed turns"], rows)


def above_activations(found: Record, group: Sequence[Record]) -> str:
    """Peak memory beyond that of the same run's forward pass, in % of the weights' size; "none" if not beyond."""
    forward = next((one for one in group if one.provider == "forward"), None)
    if forward is None or forward.peak_memory is None or found.peak_memory is None:
        return "-"
    beyond = (found.peak_memory - forward.peak_memory) / found.extra["weight_bytes"]
    return f"{beyond:.1%}" if beyond > 0.0 else "none"


def of_last_runs(records: Iterable[Record]) -> list[Record]:
    """Return the records of each name's last run: lines are fitted to one run, and `latest` may mix several."""
    groups = grouped(records, lambda found: found.name).values()
    return [found for group in groups for found in group if found.run == max(other.run for other in group)]


def growth_table(records: Sequence[Record]) -> str:
    """One row per growing quantity and provider: its range, and the fitted exponents."""
    rows = []
    for (axis, provider), group in grouped(records, lambda found: (found.extra["axis"], found.provider)).items():
        points = sorted((found.extra["x"], found.ms_p50, found.peak_memory or 0) for found in group if found.ms_p50)
        if not points:
            continue
        x, time, memory = zip(*points, strict=True)
        span = f"{x[0]:,} to {x[-1]:,}"
        rows.append([f"{axis}, {span}", provider, f"{exponent(x, time):.2f}", f"{exponent(x, memory):.2f}"])
    return table(["grows", "provider", "exponent of time", "exponent of memory"], rows)


MEMORY = (
    "Peak memory without the file cache, on top of what the process held before the model was loaded, and what "
    "`gradprune plan` predicts from the configuration."
)


def memory_table(records: Sequence[Record]) -> str:
    """One row per case and stage: measured, predicted, and their ratio."""
    rows = [
        [
            f"{found.shape}, {found.dtype}",
            found.extra["stage"],
            _number(found.peak_memory, ".0f", 2**20),
            _number(found.extra["predicted"], ".0f", 2**20),
            ratio(found.extra["predicted"], found.peak_memory),
        ]
        for found in records
    ]
    return table(["case", "stage", "peak MiB", "predicted MiB", "predicted / peak"], rows)


def memory_growth_table(records: Sequence[Record]) -> str:
    """One row per growing quantity, stage and provider: the fitted exponents; empty if nothing was measured."""
    rows = [[*names, f"{time:.2f}", f"{memory:.2f}"] for *names, time, memory in exponents(records)]
    headings = ["grows", "stage", "provider", "exponent of processor time", "exponent of memory"]
    return table(headings, sorted(rows)) if rows else ""


OVERHEAD = (
    "Calibration with streamed layers against the whole model with `--use_gradient_checkpointing`: the ratio of their "
    "processor times on one thread, measured by turns."
)


def overhead_table(records: Sequence[Record]) -> str:
    """One row per case: the median ratio over turns, and its range."""
    shown = ("ratio", "lowest", "highest")
    rows = [
        [f"{found.shape}, {found.dtype}", str(found.repeats), *(f"{found.extra[name]:.2f}" for name in shown)]
        for found in records
    ]
    return table(["job", "turns", "streamed / whole", "lowest", "highest"], rows)


STREAMED = (
    "A model larger than the memory allowed: `prune` with streamed layers and without repair, and only the calibration "
    "of other tools, each of which is stopped when it holds more than allowed. Peaks are of the host's memory without "
    "the file cache, also on a GPU."
)


def streamed_table(records: Sequence[Record]) -> str:
    """One row per provider: how its run ended, and the peak of its host memory."""
    rows = [
        [
            f"{found.shape}, {found.dtype}",
            found.provider,
            found.error or f"done in {_number(found.ms_p50, '.0f', 1e3)} s",
            _number(found.extra.get("peak_host"), ".2f", 2**30),
        ]
        for found in records
    ]
    return table(["job", "provider", "ended", "peak GiB"], rows)


STAGES = (
    "`prune` of a real model with default options, removing a fifth of its prunable parameters: the time of each stage "
    "as a multiple of a plain forward and backward pass over the calibration samples. Perplexity is measured on as "
    "many windows as there are samples."
)


def stages_table(records: Sequence[Record]) -> str:
    """One row per method: its stages in the order in which they run, and their sum."""
    stages = list(dict.fromkeys(stage for found in records for stage in found.extra["ratios"]))
    shown = [stage for stage in stages if any(found.extra["ratios"].get(stage, 0.0) >= 0.005 for found in records)]
    rows = [
        [
            f"{found.name.removeprefix('stages of ')}, {found.shape}",
            found.provider,
            *(_number(found.extra["ratios"].get(stage), ".2f") for stage in shown),
            f"{found.extra['whole']:.2f}",
        ]
        for found in records
    ]
    return table(["job", "provider", *(stage.replace("_", " ") for stage in shown), "whole"], rows)


WHOLE = (
    "`prune` with default options, stage by stage, and only calibration, by this project and by others, on fewer "
    "samples of the same length. The time per sample is the time of the row divided by its number of samples."
)


def whole_table(records: Sequence[Record]) -> str:
    """One row per stage of the whole job, and per calibration that it is compared with."""
    rows = [
        [
            f"{found.shape}, {found.dtype}",
            found.provider,
            found.error or _number(found.ms_p50, ".2f", 1e3),
            _number(found.ms_p50, ".1f", found.extra["samples"]),
            "-" if found.peak_memory is None else f"{(found.peak_memory + found.extra['weight_bytes']) / 2**30:.1f}",
        ]
        for found in records
    ]
    return table(["job", "stage", "seconds", "ms a sample", "peak GiB with the weights"], rows)


PREDICTED = (
    "Predicted, not measured: from operations and bytes that are counted without a GPU, and from assumed rates "
    "(`benchmarks/predicted/roofline.py`); accurate to within a quarter at best."
)


def predicted_table(predicted: Sequence[Record], measured: Sequence[Record]) -> str:
    """One row per prediction, with the measured time of the same case if there is one."""
    of_case = {(found.name, found.shape, found.dtype, found.provider): found for found in measured}
    rows = []
    for found in predicted:
        other = of_case.get((found.name, found.shape, found.dtype, found.provider))
        time = None if other is None else other.ms_p50
        rows.append(
            [
                f"{found.name}, {found.extra.get('label', '')} {found.shape} {found.dtype}".replace("  ", " "),
                found.provider,
                _number(found.ms_p50, ".3f" if found.extra["of"] == "kernel" else ".0f"),
                _number(time, ".3f" if found.extra["of"] == "kernel" else ".0f"),
                ratio(time, found.ms_p50),
            ]
        )
    return table(["case", "provider", "predicted ms", "measured ms", "measured / predicted"], rows)


COMPILED = (
    "What compilers make of the Triton kernels, without a device: registers and bytes of stack per thread, bytes of "
    "shared memory per block, blocks that a multiprocessor can hold at the same time, and instructions per element, in "
    "a step of the loop and in the epilogue after the last product. The tests enforce budgets for these "
    "(`tests/helpers/kernel_gates.py`)."
)


def compiled_table(records: Sequence[Record]) -> str:
    """One row per kernel, device and compiler."""
    rows = [
        [
            f"{found.provider}, {found.dtype}",
            found.shape,
            *(str(found.extra[name]) for name in ("registers", "stack", "shared", "blocks")),
            _number(found.extra.get("loop"), ".1f"),
            _number(found.extra.get("epilogue") or None, ".1f"),
        ]
        for found in records
    ]
    return table(["kernel", "for", "registers", "stack", "shared", "blocks", "loop", "epilogue"], rows)


def profile_table(records: Sequence[Record]) -> str:
    """One row per kernel of a profiled step."""
    rows = [
        [f"{found.shape}, {found.extra['step']}", found.provider.replace("|", "/"), _number(found.ms_p50, ".3f"),
         str(found.extra["calls"]), f"{found.extra['share']:.1%}"]
        for found in records
    ]  # fmt: skip
    return table(["step", "kernel", "ms", "launches", "share"], rows)


def timing_table(records: Sequence[Record]) -> str:
    """One row per record: the job, the step and its times."""
    return table(
        ["job", "step", "p20 ms", "p50 ms", "p80 ms"],
        [[found.shape, found.provider, *_times(found)] for found in records],
    )


def quality_table(records: Sequence[Record]) -> str:
    """Table of one model: one row per provider, one column per ratio; the mean over seeds (lowest to highest).

    The fraction of parameters that a provider keeps is shown if it exceeds the smallest at that ratio by more than a
    hundredth of the model.

    Each ratio at which zero-shot questions were asked has a second column: the mean accuracy over tasks, in percent.
    """
    pruned = [found for found in records if found.provider != "dense"]
    ratios = sorted({found.extra["ratio"] for found in pruned})
    asked = sorted({found.extra["ratio"] for found in pruned if found.extra.get("accuracies")})
    least = {ratio: min(found.extra["kept"] for found in pruned if found.extra["ratio"] == ratio) for ratio in ratios}
    rows = []
    for provider, group in grouped(pruned, lambda found: found.provider).items():
        cells = {ratio: [f for f in group if f.extra["ratio"] == ratio] for ratio in ratios}
        shown = [_spread(of_ratio) + _more_kept(of_ratio, least[ratio]) for ratio, of_ratio in cells.items()]
        rows.append([provider, *shown, *(_accuracy(cells[ratio]) for ratio in asked)])
    header = ["provider", *(f"{percent(ratio)} removed" for ratio in ratios)]
    return table([*header, *(f"zero-shot, {percent(ratio)}" for ratio in asked)], rows)


def dense_accuracy(records: Sequence[Record]) -> str:
    """The dense model's mean zero-shot accuracy, to follow its perplexity; empty if no question was asked."""
    value = _accuracy([found for found in records if found.provider == "dense"])
    return "" if value == "-" else f", zero-shot {value} %"


RECOVERY = (
    "A pruned and repaired model before and after `gradprune recover` (`python -m benchmarks.quality.recovery`). Way "
    "back: the fraction of pruning's increase in log perplexity that recovery undid."
)


def recovery_table(records: Sequence[Record]) -> str:
    """One row per model and stage: perplexity, way back, and accuracy in percent, as mean over tasks and per task."""
    tasks = sorted({task for found in records for task in found.extra["accuracies"]})
    rows = []
    for group in grouped(records, lambda found: (found.work, found.conditions)).values():
        for found in group:
            accuracies = found.extra["accuracies"]
            shown = (f"{100 * accuracies[task]:.1f}" if task in accuracies else "-" for task in tasks)
            rows.append(
                [f"{found.name}, {found.shape}", found.provider, f"{found.extra['perplexity']:.2f}",
                 _number(way_back(group) if found.provider == "recovered" else None, ".0%"),
                 *([_accuracy([found]), *shown] if tasks else []), _number(found.extra.get("steps"), ",.0f")]
            )  # fmt: skip
    zero_shot = ["zero-shot", *tasks] if tasks else []
    return table(["model", "stage", "perplexity", "way back", *zero_shot, "steps"], rows)


def way_back(records: Sequence[Record]) -> float | None:
    """Fraction of pruning's increase in log perplexity that recovery undid; None if there was no increase.

    records: those of one recovery; None is also returned if a stage of it is missing.
    """
    found = {record.provider: math.log(record.extra["perplexity"]) for record in records}
    if not found.keys() >= {"dense", "pruned", "recovered"} or found["pruned"] <= found["dense"]:
        return None
    return (found["pruned"] - found["recovered"]) / (found["pruned"] - found["dense"])


def inference_table(records: Sequence[Record]) -> str:
    """One row per setting and model, with ratios to the dense model of the same run."""
    rows = []
    for group in grouped(records, lambda found: found.work).values():
        dense = next((found for found in group if found.provider == "dense"), None)
        for found in group:
            speed = found.extra.get("tokens_per_s")
            rows.append(
                [
                    f"{found.name}, {found.shape}, {found.dtype}",
                    found.provider,
                    _number(found.extra.get("parameters"), ".1f", 1e6),
                    _number(found.extra.get("weight_bytes"), ".1f", 2**20),
                    _number(speed, ".1f") if speed else (found.error or "-"),
                    ratio(speed, dense and dense.extra.get("tokens_per_s")),
                ]
            )
    return table(["setting", "model", "M parameters", "weights MiB", "tokens/s", "x dense"], rows)


def ratio(value: float | None, base: float | None) -> str:
    """value / base, or "-" if one of them is missing."""
    return f"{value / base:.2f}" if value is not None and base else "-"


def _times(found: Record) -> list[str]:
    """The three percentiles in milliseconds, or the reason why there are none."""
    if found.ms_p50 is None:
        return [(found.error or "not measured").replace("|", "/"), "", ""]
    return [f"{value:.3f}" if value < 100 else f"{value:.0f}" for value in (found.ms_p20, found.ms_p50, found.ms_p80)]


def _number(value: float | None, style: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value / unit, style)


def _accuracy(records: Sequence[Record], of: str = "accuracies") -> str:
    """Mean accuracy over tasks and seeds in percent, "-" without any; of: the field of `extra` with the accuracies."""
    values = [fmean(accuracies.values()) for found in records if (accuracies := found.extra.get(of))]
    return f"{100 * fmean(values):.1f}" if values else "-"


def _spread(records: Sequence[Record]) -> str:
    values = [found.extra["perplexity"] for found in records]
    if not values:
        return "-"
    return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _more_kept(records: Sequence[Record], least: float) -> str:
    """The mean fraction of parameters kept, such as ", 85% kept"; empty if not above `least` by more than 0.01."""
    kept = fmean(found.extra["kept"] for found in records) if records else least
    return f", {kept:.0%} kept" if kept > least + 0.01 else ""


CALIBRATION_SIZE = (
    "Excess, ln(perplexity / dense perplexity), by the number of calibration samples of 128 tokens, which are the same "
    "for all providers. Removed: in % of the prunable parameters (`python -m benchmarks.quality.calibration_size`)."
)


def calibration_size_table(records: Sequence[Record]) -> str:
    """One row per model, ratio and provider, one column per number of samples; means over seeds."""
    sizes = sorted({found.extra["num_samples"] for found in records})
    rows = []
    for name, of_model in by_model(records, shown=["num_samples"]).items():
        for (ratio, provider), group in grouped(of_model, lambda found: (found.extra["ratio"], found.provider)).items():
            by_size = grouped(group, lambda found: found.extra["num_samples"])
            cells = (f"{fmean(map(_excess, by_size[size])):.3f}" if size in by_size else "-" for size in sizes)
            rows.append([name, percent(ratio), provider, *cells])
    return table(["model", "removed", "by", *(f"{size} samples" for size in sizes)], rows)


def _excess(found: Record, text: str = "") -> float:
    return math.log(found.extra[f"{text}perplexity"] / found.extra[f"{text}perplexity_dense"])


DISTILLED_TEXT = (
    "Excess, ln(perplexity / dense perplexity), on text like the calibration text and on other text, and mean "
    "zero-shot accuracy, by the share of samples that the model wrote itself (own text) and by the weight of the "
    "next-token loss in distillation (the text's share), compared with peers. Removed: in % of the prunable parameters "
    "(`python -m benchmarks.quality.distilled_text`)."
)


def distilled_text_table(records: Sequence[Record]) -> str:
    """One row per model, ratio, provider, shares and number of questions; means over seeds."""

    def row_of(found: Record) -> tuple[float, str, float | None, float | None, int | None]:
        extra = found.extra
        # Records written before the option `own_text` existed do not name its share.
        own = extra.get("own_text", 0.0) if "share" in extra else None
        return extra["ratio"], found.provider, own, extra.get("share"), extra["max_questions"]

    def place_of(found: Record) -> tuple[float, bool, float]:
        """Sort key: by ratio, then peers last, then by the share of own text."""
        ratio, _, own, _, _ = row_of(found)
        return ratio, own is None, own or 0.0

    groups = [
        (name, *row)
        for name, of_model in sorted(by_model(records, shown=["max_questions"]).items())
        for row in grouped(sorted(of_model, key=place_of), row_of).items()
    ]
    rows = []
    for name, (ratio, provider, own, share, questions), group in groups:
        same, other = (fmean(_excess(found, text) for found in group) for text in ("", "other_"))
        zero_shot = ["-", "-"]
        if group[0].extra["accuracies"]:
            zero_shot = [f"{_accuracy(group)} ({_accuracy(group, 'accuracies_dense')})", str(questions or "all")]
        shares = ("-" if value is None else percent(value) for value in (own, share))
        rows.append([name, percent(ratio), provider, *shares, f"{same:.3f}", f"{other:.3f}", *zero_shot])
    return table(
        [
            *("model", "removed", "by", "own text", "the text's share", "excess", "on other text"),
            *("zero-shot (dense)", "questions a task"),
        ],
        rows,
    )


EXPERTS = (
    "Held-out perplexity of a small mixture of experts, dense and pruned, by repair. Rows name what is pruned, how "
    "much of the parameters is removed, and the number of calibration samples of 128 tokens "
    "(`benchmarks/quality/experts.py`)."
)


def experts_table(records: Sequence[Record]) -> str:
    """One row per model, case and number of samples, one column per repair."""
    repairs = list(dict.fromkeys(found.provider for found in records))
    rows = []
    for (name, shape), group in grouped(records, lambda found: (found.name, found.shape)).items():
        by_repair = {found.provider: f"{found.extra['perplexity']:.3f}" for found in group}
        dense = f"{group[0].extra['perplexity_dense']:.3f}"
        rows.append([f"{name}: {shape}", dense, *(by_repair.get(repair, "-") for repair in repairs)])
    return table(["pruned", "dense", *repairs], rows)


VANISHING = (
    "Scaling the gradients of two deep models that compute the same function, pruned by {} without repair of weights: "
    "one healthy, one whose first layer looks unimportant to gradients (`benchmarks/quality/deep_model.py`). Gradient "
    "ratio: the largest layer mean of |gradient| divided by the smallest. T is the H-GSP temperature."
)


def vanishing_table(records: Sequence[Record]) -> str:
    """One row per model, temperature and scaling."""
    rows = [
        [
            found.name,
            f"{found.extra['temperature']:g}",
            found.extra["gradient_fix"],
            f"{found.extra['gradient_ratio_before']:,.0f}",
            f"{found.extra['gradient_ratio_after']:,.0f}",
            f"{found.extra['first_mlp_pruned']:.0%}",
            str(found.extra["over_pruned_blocks"]),
            f"{found.extra['perplexity_dense']:.2f}",
            f"{found.extra['perplexity']:.2f}",
        ]
        for found in records
    ]
    header = [
        "model",
        "T",
        "scaling",
        "gradient ratio before",
        "after",
        "first MLP loses",
        "over-pruned blocks",
        "dense perplexity",
        "pruned",
    ]
    return table(header, rows)
