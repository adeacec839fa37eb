"""Table rows as text, shared by the terminal and the HTML report."""

from collections.abc import Sequence
from typing import Any

from gradprune.models import KINDS

CURVE_HEADER = ("ratio", "parameters", "perplexity", "tokens per second")


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(quantity, before, after, change) as text, for every quantity of `summary.json` that was measured."""
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
    """A task's accuracies before and after, with their standard errors, and the difference in percentage points."""
    rows = []
    for name, key in (("accuracy", "accuracy"), ("accuracy per byte", "per_byte")):
        before, after = task["before"], task["after"]
        if before[key] is not None:
            dense, pruned = (f"{100 * e[key]:.1f} ± {100 * e[f'{key}_stderr']:.1f} %" for e in (before, after))
            rows.append((f"{task['task']} {name}", dense, pruned, f"{100 * (after[key] - before[key]):+.1f}"))
    return rows


def curve_rows(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """(ratio, parameters, perplexity, tokens per second) as text: the dense model, then one row per ratio."""
    first = summaries[0]
    rows = [("dense", first, "before")] + [(f"{s['pruning_ratio']['requested']:g}", s, "after") for s in summaries]
    cells = [(name, s["parameters"][k], s["perplexity"][k], s["tokens_per_second"][k]) for name, s, k in rows]
    return [
        (name, f"{parameters:,}", f"{perplexity:.3f}", f"{speed:,.0f}" if speed else "-")
        for name, parameters, perplexity, speed in cells
    ]


def layer_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """(layer, then per kind of block the number and fraction of groups kept) as text, one row per layer."""
    rows = []
    for layer in summary["layers"]:
        cells = [str(layer["layer"])]
        for kind in KINDS:
            kept, groups = layer[kind.name]["kept"], layer[kind.name][kind.unit]
            cells += [f"{kept} of {groups}", f"{kept / groups:.0%}" if groups else "-"]
        rows.append(tuple(cells))
    return rows
