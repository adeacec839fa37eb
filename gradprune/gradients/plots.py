"""The figures of `GradientVisualizer`, drawn from layer statistics without pyplot's global state."""

import math
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter

from gradprune.gradients.diagnosis import Diagnosis, diagnose_gradients
from gradprune.gradients.statistics import LayerGradients, pool_steps

# The user's own matplotlib settings must not change the files.
STYLE: list[str | dict[str, Any]] = [
    "default",
    {"font.family": "DejaVu Sans", "hatch.color": "#808080", "axes.spines.top": False, "axes.spines.right": False},
]

# Okabe and Ito's colours stay apart for colour-blind readers; their yellow is too pale for lines. Each step has a
# marker of its own as well.
_SERIES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)
_BLUE, _PALE_BLUE, _VERMILLION, _GREEN = "#0072B2", "#A6CBE3", "#D55E00", "#009E73"
_ABSENT: dict[str, Any] = {"facecolor": "#E8E8E8", "edgecolor": "#808080", "linewidth": 0.0, "hatch": "////"}
_MISSING: dict[str, Any] = {"facecolor": "white", "edgecolor": "#B0B0B0", "linewidth": 0.0, "hatch": "...."}
# The smallest |g| of millions lies decades below everything else: the axis ends this far below the smallest mean.
_DECADES_BELOW_MEAN = 3


def distribution_figure(title: str, layers: list[LayerGradients]) -> Figure:
    """Per layer a box from mean - std to mean + std of |g| with whiskers to its minimum and maximum."""
    figure, axes = _layer_figure(layers, "|gradient| of one weight")
    live = [layer for layer in layers if layer.mean > 0.0]
    lowest = min((layer.mean for layer in live), default=1.0) / 10.0**_DECADES_BELOW_MEAN
    bottom, top = _log_range(axes, [v for layer in live for v in (layer.minimum, layer.maximum) if v >= lowest])
    positions = [layer.layer for layer in live]
    low = [max(layer.mean - layer.std, layer.minimum, bottom) for layer in live]
    high = [layer.mean + layer.std for layer in live]
    axes.vlines(positions, [max(layer.minimum, bottom) for layer in live], [layer.maximum for layer in live],
                color="#404040", linewidth=1.0, label="minimum to maximum", zorder=2)  # fmt: skip
    axes.bar(positions, [h - b for h, b in zip(high, low, strict=True)], 0.7, low,
             color=_PALE_BLUE, edgecolor=_BLUE, label="mean - std to mean + std", zorder=3)  # fmt: skip
    axes.hlines([layer.mean for layer in live], [p - 0.35 for p in positions], [p + 0.35 for p in positions],
                color=_VERMILLION, linewidth=2.0, label="mean", zorder=4)  # fmt: skip
    cut = [layer.layer for layer in live if layer.minimum < bottom]
    if cut:
        axes.plot(cut, [bottom] * len(cut), linestyle="none", marker=7, markersize=5, color="#404040", clip_on=False,
                  label="minimum lies lower", zorder=5)  # fmt: skip
    axes.set_ylim(bottom, top)
    _finish(figure, axes, title, diagnose_gradients(layers))
    return figure


def comparison_figure(names: list[str], steps: list[list[LayerGradients]]) -> Figure:
    """The layers' mean |g|, one line a step."""
    pooled = pool_steps(steps)
    figure, axes = _layer_figure(pooled, "mean |gradient|")
    _log_range(axes, [layer.mean for step in steps for layer in step if layer.mean > 0.0])
    few = len(steps) <= len(_SERIES)
    shades = ScalarMappable(Normalize(0, max(len(steps) - 1, 1)), "viridis")
    for index, (name, step) in enumerate(zip(names, steps, strict=True)):
        color, marker = _SERIES[index] if few else (shades.to_rgba(index), ".")
        label = f"step {index} ({plain(name)})" if few else None
        _line(axes, step, [layer.mean for layer in step], color=color, marker=marker, label=label)
    if not few:
        figure.colorbar(shades, ax=axes, label="step", pad=0.01)
    title = f"Mean gradient of each layer, {_count(len(steps), 'step')}"
    _finish(figure, axes, title, diagnose_gradients(pooled))
    return figure


def variance_figure(steps: list[list[LayerGradients]]) -> Figure:
    """Per layer the mean of |g|, its std over the weights within a step and the std of its mean across steps."""
    pooled = pool_steps(steps)
    figure, axes = _layer_figure(pooled, "|gradient|")
    means = {layer.layer: [own.mean for step in steps for own in step if own.layer == layer.layer] for layer in pooled}
    across = [float(np.std(means[layer.layer])) for layer in pooled]
    within = [math.sqrt(max(layer.std**2 - s**2, 0.0)) for layer, s in zip(pooled, across, strict=True)]
    mean = [layer.mean for layer in pooled]
    several = len(steps) > 1
    _log_range(axes, [value for value in mean + within + across * several if value > 0.0])
    _line(axes, pooled, within, color=_VERMILLION, marker="s", label="std over the weights, within a step")
    _line(axes, pooled, mean, color=_BLUE, marker="o", label="mean")
    if several:
        _line(axes, pooled, across, color=_GREEN, marker="^", label="std of the mean, across steps")
    title = f"Mean and spread of each layer's gradient, {_count(len(steps), 'step')}"
    _finish(figure, axes, title, diagnose_gradients(pooled))
    return figure


def heatmap_figure(title: str, layers: list[LayerGradients]) -> Figure:
    """log10 of the L2 norm of every parameter's gradient: layers across, parameter names down."""
    names = list(dict.fromkeys(name for layer in layers for name in layer.parameter_norms))
    first, last = layers[0].layer, layers[-1].layer
    norms = np.full((max(len(names), 1), last - first + 1), np.nan)
    for layer in layers:
        for name, norm in layer.parameter_norms.items():
            norms[names.index(name), layer.layer - first] = norm
    figure = Figure(figsize=(_width(last - first + 1) + 2.0, min(2.4 + 0.28 * len(norms), 30.0)), layout="constrained")
    axes = figure.add_subplot()
    values = np.log10(norms, where=norms > 0.0, out=np.full_like(norms, np.nan))
    scale = _color_scale(values)
    image = axes.imshow(values, "viridis", scale, aspect="auto", interpolation="nearest",
                        extent=(first - 0.5, last + 0.5, len(norms) - 0.5, -0.5))  # fmt: skip
    figure.colorbar(image, ax=axes, label="log10 of the gradient's L2 norm", pad=0.01)
    legend = [
        _hatch(axes, norms == 0.0, first, "norm 0", _ABSENT),
        _hatch(axes, np.isnan(norms), first, "no gradient", _MISSING),
    ]
    thinned = range(0, len(names), max(1, math.ceil(len(names) / 100)))
    axes.set_yticks(thinned, [plain(names[index]) for index in thinned])
    axes.tick_params(axis="y", labelsize="small")
    axes.spines[:].set_visible(False)
    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(_integers(first, last))
    _finish(figure, axes, title, diagnose_gradients(layers), [patch for patch in legend if patch], shade=False)
    return figure


def plain(name: str) -> str:
    """A name that people chose as figure text: one short line in which matplotlib finds no formula."""
    return textwrap.shorten(name, 40, placeholder="...").replace("$", r"\$")


def _layer_figure(layers: list[LayerGradients], quantity: str) -> tuple[Figure, Axes]:
    first, last = layers[0].layer, layers[-1].layer
    figure = Figure(figsize=(_width(last - first + 1), 4.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="decoder layer", ylabel=f"{quantity} (log scale)", yscale="log", xlim=(first - 0.6, last + 0.6))
    axes.xaxis.set_major_locator(_integers(first, last))
    axes.grid(axis="y", color="#D8D8D8", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _width(layers: int) -> float:
    return min(max(7.5, 3.0 + 0.2 * layers), 16.0)


def _integers(first: int, last: int) -> FixedLocator | MaxNLocator:
    """Every layer where there is room, else round numbers."""
    return FixedLocator(range(first, last + 1)) if last - first < 40 else MaxNLocator(20, integer=True)


def _log_range(axes: Axes, values: Sequence[float]) -> tuple[float, float]:
    """Set whole decades around the positive `values`, so that the axis always has labels; 1e-8 to 1 without any."""
    low, high = (math.floor(math.log10(min(values))), math.log10(max(values))) if values else (-8, 0.0)
    bottom, top = 10.0 ** max(low, -300), 10.0 ** (math.floor(high) + 1)
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(LogLocator(numticks=9))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return bottom, top


def _line(axes: Axes, layers: list[LayerGradients], values: list[float], *, color: Any, marker: str,
          label: str | None) -> None:  # fmt: skip
    """A line through the positive values, broken at zeros, which a log scale cannot show: crosses at the bottom."""
    positions = range(layers[0].layer, layers[-1].layer + 1)
    known = {layer.layer: value for layer, value in zip(layers, values, strict=True)}
    shown = [known.get(position, 0.0) or math.nan for position in positions]
    size = 5.0 if len(positions) <= 40 else 3.5
    axes.plot(positions, shown, color=color, marker=marker, markersize=size, linewidth=1.3, label=label)
    zeros = [position for position, value in known.items() if value == 0.0]
    axes.plot(zeros, [0.015] * len(zeros), linestyle="none", marker="x", color=color, markersize=size + 1.0,
              transform=axes.get_xaxis_transform())  # fmt: skip


def _color_scale(values: Any) -> Normalize:
    """From the smallest to the largest finite value; at least half a decade to either side of equal ones."""
    if np.isnan(values).all():
        return Normalize(-1.0, 0.0)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = 0.5 if high - low < 1e-3 else 0.0
    return Normalize(low - margin, high + margin)


def _hatch(axes: Axes, cells: Any, first: int, label: str, style: dict[str, Any]) -> Patch | None:
    """Hatch the True cells of an image; returns the legend's patch if there are any."""
    found = [Rectangle((column + first - 0.5, row - 0.5), 1.0, 1.0) for row, column in np.argwhere(cells)]
    if not found:
        return None
    axes.add_collection(PatchCollection(found, **style), autolim=False)
    return Patch(label=label, **style)


def _finish(
    figure: Figure,
    axes: Axes,
    title: str,
    diagnosis: Diagnosis,
    extra: Sequence[Patch] = (),
    shade: bool = True,
) -> None:
    """Mark vanishing, zero and frozen layers above the axes, say the verdict in the title, add the legend."""
    handles = [*axes.get_legend_handles_labels()[0], *extra]
    by_mark: dict[str, list[int]] = {}
    for layer in diagnosis.layers:
        by_mark.setdefault(diagnosis.mark(layer), []).append(layer.layer)
    by_mark.pop("", None)
    if shade and (absent := [layer.layer for layer in diagnosis.layers if layer.mean == 0.0]):
        for index in absent:
            axes.axvspan(index - 0.5, index + 0.5, zorder=0, **_ABSENT)
        handles.append(Patch(label="no gradient", **_ABSENT))
    marked = [index for indices in by_mark.values() for index in indices]
    if marked:
        handles += axes.plot(marked, [1.02] * len(marked), linestyle="none", marker="v", color=_VERMILLION,
                             markeredgecolor="black", markersize=6, clip_on=False, label="vanishing or frozen layer",
                             transform=axes.get_xaxis_transform())  # fmt: skip
    notes = "".join(f" {mark.capitalize()}: {_runs(indices)}." for mark, indices in by_mark.items())
    width = int(figure.get_figwidth() * 10.5)
    text = f"Ratio of the largest layer mean to the smallest {diagnosis.ratio:.1f}: {diagnosis.verdict}.{notes}"
    axes.set_title("\n".join([title, *textwrap.wrap(text, width)]), loc="left", fontsize="medium", pad=14)
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize="small")


def _runs(indices: list[int]) -> str:
    """Ascending numbers as ranges: 0-3, 7."""
    runs = [[index for _, index in run] for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
