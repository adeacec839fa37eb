"""Table rows and sentences about a run, shared by the terminal, the HTML report and the model card."""

from collections.abc import Iterator, Sequence
from typing import Any

from gradprune.errors import counted
from gradprune.evaluation.tasks import percent
from gradprune.models import KINDS, Kind

# The kinds of blocks that distillation leaves as they are: routed experts.
_NOT_DISTILLED = ("expert_channels", "experts")


def curve_header(summaries: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the column names of `curve_rows`."""
    tasks = (f"{task['task']} accuracy" for task in summaries[0]["tasks"])
    return ("ratio", "parameters", "perplexity", *tasks, "tokens per second")


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return (quantity, before, after, change) as text, for every quantity of `summary.json` that was measured."""
    named = [
        ("parameters", "parameters", "{:,.0f}"),
        ("perplexity", "perplexity", "{:.3f}"),
        ("bytes on disk", "bytes_on_disk", "{:,.0f}"),
        ("tokens per second", "tokens_per_second", "{:,.0f}"),
    ]
    rows = []
    for name, key, style in named:
        before, after = summary[key]["before"], summary[key]["after"]
        if before is not None and after is not None:
            rows.append((name, style.format(before), style.format(after), f"{after / before:.3f}x"))
    return rows + [row for task in summary["tasks"] for row in _task_rows(task)]


def _task_rows(task: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return a task's accuracies before and after, with standard errors, and their difference in percentage points."""
    rows = []
    for name, key in (("accuracy", "accuracy"), ("accuracy per byte", "per_byte")):
        before, after = task["before"], task["after"]
        if before[key] is not None:
            dense, pruned = _percent(before, key), _percent(after, key)
            rows.append((f"{task['task']} {name}", dense, pruned, f"{100 * (after[key] - before[key]):+.1f} points"))
    return rows


def curve_rows(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a row for the dense model and for each ratio: ratio, parameters, perplexity, task accuracies, speed."""
    first = summaries[0]
    rows = [("dense", first, "before")] + [(f"{s['pruning_ratio']['requested']:g}", s, "after") for s in summaries]
    return [(name, *_curve_cells(summary, key)) for name, summary, key in rows]


def _curve_cells(summary: dict[str, Any], key: str) -> Iterator[str]:
    yield f"{summary['parameters'][key]:,}"
    yield f"{summary['perplexity'][key]:.3f}"
    for task in summary["tasks"]:
        yield _percent(task[key], "accuracy")
    speed = summary["tokens_per_second"][key]
    yield f"{speed:,.0f}" if speed else "-"


def _percent(measured: dict[str, Any], key: str) -> str:
    return percent(measured[key], measured[f"{key}_stderr"])


def scored_kinds(layers: Sequence[dict[str, Any]]) -> tuple[Kind, ...]:
    """Return the kinds of block with groups in at least one layer; layers: the entry "layers" of `summary.json`."""
    return tuple(kind for kind in KINDS if any(layer.get(kind.name, {}).get(kind.unit) for layer in layers))


def kinds_text(kinds: Sequence[Kind]) -> str:
    """Name the groups of these kinds in words, such as "KV groups, MLP channels and experts"."""
    *others, last = (kind.groups for kind in kinds)
    return f"{', '.join(others)} and {last}" if others else last


def layer_header(summary: dict[str, Any]) -> tuple[str, ...]:
    """Return the column names of `layer_rows`."""
    return ("layer", *(cell for kind in scored_kinds(summary["layers"]) for cell in (kind.groups, "kept")))


def layer_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a row of text per layer: its number, then per kind of block the number and the fraction of groups kept."""
    rows, kinds = [], scored_kinds(summary["layers"])
    for layer in summary["layers"]:
        cells = [str(layer["layer"])]
        for kind in kinds:
            kept, groups = layer[kind.name]["kept"], layer[kind.name][kind.unit]
            cells += [f"{kept} of {groups}", f"{kept / groups:.0%}" if groups else "-"]
        rows.append(tuple(cells))
    return rows


def samples_text(summary: dict[str, Any]) -> str:
    """Describe the calibration samples, in words without a full stop."""
    calibration = summary["calibration"]
    own = f", {calibration['own_text']:.0%} of them written by the model itself" if calibration["own_text"] else ""
    return f"{counted(calibration['num_samples'], 'sample')} of {calibration['seq_len']} tokens{own}"


def repair_text(summary: dict[str, Any]) -> str:
    """Describe how kept weights were repaired, in sentences that each begin with a space; empty without repair."""
    text, taught = "", summary["distillation"]
    if summary["repair"]:
        text = " The output projections of pruned blocks were re-solved by least squares."
    if taught is not None and taught["factor"]:
        kinds = [kind for kind in scored_kinds(summary["layers"]) if kind.name not in _NOT_DISTILLED]
        samples = counted(taught["samples"], "sample")
        own = f" ({taught['text']:.0%} of the loss is that of predicting the text itself)" if taught["text"] else ""
        text += (
            f" The kept {kinds_text(kinds)} were distilled from the dense model's predictions for {samples}{own}:"
            f" the loss on held-out samples went from {taught['before']:.3f} to {taught['after']:.3f} nats per token."
        )
    return text
