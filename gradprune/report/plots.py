"""The figures of `GradientVisualizer`, drawn from layer statistics without pyplot's global state."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter

from gradprune.errors import counted
from gradprune.vanishing.diagnosis import Diagnosis, diagnose_gradients
from gradprune.vanishing.statistics import LayerGradients, pool_steps

# A fixed style, so that the user's matplotlib settings do not affect the files.
STYLE: list[str | dict[str, Any]] = [
    "default",
    {"font.family": "DejaVu Sans", "hatch.color": "#808080", "axes.spines.top": False, "axes.spines.right": False},
]

# Each step's line has its own colour and its own marker. The colours are the Okabe-Ito palette, which is safe for
# colour-blind readers, without yellow, which is too pale for lines.
_SERIES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)
_BLUE, _PALE_BLUE, _FAINT_BLUE, _VERMILLION, _GREEN = "#0072B2", "#A6CBE3", "#E4EFF6", "#D55E00", "#009E73"
_ABSENT: dict[str, Any] = {"facecolor": "#E8E8E8", "edgecolor": "#808080", "linewidth": 0.0, "hatch": "////"}
_MISSING: dict[str, Any] = {"facecolor": "white", "edgecolor": "#B0B0B0", "linewidth": 0.0, "hatch": "...."}
_NO_GRADIENT, _ZERO, _MARKED = "no gradient", "zero", "vanishing or frozen layer"
# The axis ends this many decades below the smallest mean, because the minimum of millions of |g| is far lower still.
_DECADES_BELOW_MEAN = 2


def distribution_figure(title: str, layers: list[LayerGradients]) -> Figure:
    """Draw, for each layer, a box from mean - std to mean + std of |g|, with whiskers to its minimum and maximum."""
    figure, axes = _layer_figure(layers, "|gradient|")
    live = [layer for layer in layers if layer.mean > 0.0]
    lowest = min((layer.mean for layer in live), default=1.0) / 10.0**_DECADES_BELOW_MEAN
    bottom = _log_range(axes, [v for layer in live for v in (max(layer.minimum, lowest), layer.maximum)])
    positions = [layer.layer for layer in live]
    low = [max(layer.minimum, bottom) for layer in live]
    axes.vlines(positions, low, [layer.maximum for layer in live],
                color="#404040", linewidth=1.0, label="minimum to maximum", zorder=2)  # fmt: skip
    _boxes(axes, [layer for layer in live if layer.mean - layer.std > layer.minimum], bottom)
    _open_boxes(axes, [layer for layer in live if layer.mean - layer.std <= layer.minimum], bottom)
    axes.hlines([layer.mean for layer in live], [p - 0.35 for p in positions], [p + 0.35 for p in positions],
                color=_VERMILLION, linewidth=2.0, label="mean", zorder=4)  # fmt: skip
    if cut := [layer.layer for layer in live if layer.minimum < bottom]:
        axes.plot(cut, [bottom] * len(cut), linestyle="none", marker=7, markersize=5, color="#404040", clip_on=False,
                  label="minimum is below the axis, or is 0", zorder=5)  # fmt: skip
    _finish(figure, axes, title, diagnose_gradients(layers))
    return figure


def comparison_figure(names: list[str], steps: list[list[LayerGradients]]) -> Figure:
    """Plot the layers' mean |g|, one line per step."""
    pooled = pool_steps(steps)
    figure, axes = _layer_figure(pooled, "mean |gradient|")
    _log_range(axes, [layer.mean for step in steps for layer in step if layer.mean > 0.0])
    few = len(steps) <= len(_SERIES)
    shades = colormaps["viridis"]
    for index, (name, step) in enumerate(zip(names, steps, strict=True)):
        color, marker = _SERIES[index] if few else (shades(index / (len(steps) - 1)), ".")
        label = f"step {index} ({plain(name)})" if few else None
        _line(axes, step, [layer.mean for layer in step], color=color, marker=marker, label=label)
    if not few:
        figure.colorbar(ScalarMappable(Normalize(0, len(steps) - 1), shades), ax=axes, label="step", pad=0.01)
    title = f"Mean gradient of each layer, {counted(len(steps), 'step')}"
    _finish(figure, axes, title, diagnose_gradients(pooled))
    return figure


def variance_figure(steps: list[list[LayerGradients]]) -> Figure:
    """Plot each layer's mean |g|, the std of |g| over the weights in a step, and the std of the mean across steps."""
    pooled = pool_steps(steps)
    figure, axes = _layer_figure(pooled, "|gradient|")
    entries = [[entry for step in steps for entry in step if entry.layer == layer.layer] for layer in pooled]
    across = [float(np.std([entry.mean for entry in own])) for own in entries]
    within = [math.sqrt(float(np.mean([entry.std**2 for entry in own]))) for own in entries]
    mean = [layer.mean for layer in pooled]
    several = len(steps) > 1
    _log_range(axes, [value for value in mean + within + across * several if value > 0.0])
    _line(axes, pooled, within, color=_VERMILLION, marker="s", label="std over the weights, within a step")
    _line(axes, pooled, mean, color=_BLUE, marker="o", label="mean")
    if several:
        _line(axes, pooled, across, color=_GREEN, marker="^", label="std of the mean, across steps")
    title = f"Mean and spread of each layer's gradient, {counted(len(steps), 'step')}"
    _finish(figure, axes, title, diagnose_gradients(pooled))
    return figure


def heatmap_figure(title: str, layers: list[LayerGradients]) -> Figure:
    """Draw log10 of the L2 norm of every parameter's gradient, with layers as columns and parameter names as rows."""
    names = list(dict.fromkeys(name for layer in layers for name in layer.parameter_norms))
    first, last = layers[0].layer, layers[-1].layer
    norms = np.full((max(len(names), 1), last - first + 1), np.nan)
    for layer in layers:
        for name, norm in layer.parameter_norms.items():
            norms[names.index(name), layer.layer - first] = norm
    height = min(max(2.4 + 0.28 * len(norms), 4.0), 30.0)
    figure = Figure(figsize=(_width(last - first + 1) + 2.0, height), layout="constrained")
    axes = figure.add_subplot()
    values = np.log10(norms, where=norms > 0.0, out=np.full_like(norms, np.nan))
    scale = _color_scale(values)
    image = axes.imshow(values, "viridis", scale, aspect="auto", interpolation="nearest",
                        extent=(first - 0.5, last + 0.5, len(norms) - 0.5, -0.5))  # fmt: skip
    figure.colorbar(image, ax=axes, label="log10 of the gradient's L2 norm", pad=0.01, aspect=25.0,
                    shrink=min(1.0, 8.0 / height), anchor=(0.0, 1.0))  # fmt: skip
    legend = [
        _hatch(axes, norms == 0.0, first, _ZERO, _ABSENT),
        _hatch(axes, np.isnan(norms), first, _NO_GRADIENT, _MISSING),
    ]
    thinned = range(0, len(names), max(1, math.ceil(len(names) / 100)))
    axes.set_yticks(thinned, [plain(names[index]) for index in thinned])
    axes.tick_params(axis="y", labelsize="small")
    axes.spines[:].set_visible(False)
    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(layer_ticks(first, last))
    _finish(figure, axes, title, diagnose_gradients(layers), [patch for patch in legend if patch])
    return figure


def plain(name: str) -> str:
    """Make a user-chosen name safe for figures: one short line, with `$` escaped so that matplotlib sees no formula."""
    line = " ".join(name.split())
    return (line if len(line) <= 48 else f"{line[:45]}...").replace("$", r"\$")


def layer_ticks(first: int, last: int) -> FixedLocator | MaxNLocator:
    """Return ticks at every layer from `first` to `last` if there is room, else at round numbers."""
    return FixedLocator(range(first, last + 1)) if last - first < 40 else MaxNLocator(20, integer=True)


def _layer_figure(layers: list[LayerGradients], quantity: str) -> tuple[Figure, Axes]:
    first, last = layers[0].layer, layers[-1].layer
    figure = Figure(figsize=(_width(last - first + 1), 5.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="decoder layer", ylabel=f"{quantity}, log scale", yscale="log", xlim=(first - 0.6, last + 0.6))
    axes.xaxis.set_major_locator(layer_ticks(first, last))
    axes.grid(axis="y", color="#D8D8D8", linewidth=0.6)
    axes.set_axisbelow(True)
    for index in (layer.layer for layer in layers if layer.mean == 0.0):
        axes.axvspan(index - 0.5, index + 0.5, zorder=0, label=_NO_GRADIENT, **_ABSENT)
    return figure, axes


def _width(layers: int) -> float:
    return min(max(7.5, 3.0 + 0.2 * layers), 16.0)


def _log_range(axes: Axes, values: Sequence[float]) -> float:
    """Set the y limits to whole decades around the positive `values`, so that ticks have labels; return the lower."""
    low, high = (math.log10(min(values)), math.log10(max(values))) if values else (-8.0, -0.1)
    # A margin of 0.1 decade, because a marker on the axis itself would be clipped.
    bottom, top = 10.0 ** max(math.floor(low - 0.1), -300), 10.0 ** math.ceil(high + 0.1)
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(LogLocator(numticks=9))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return bottom


def _boxes(axes: Axes, layers: list[LayerGradients], bottom: float) -> None:
    """Draw boxes from mean - std, but no lower than `bottom`, to mean + std."""
    if not layers:
        return
    low = [max(layer.mean - layer.std, bottom) for layer in layers]
    heights = [layer.mean + layer.std - edge for layer, edge in zip(layers, low, strict=True)]
    axes.bar([layer.layer for layer in layers], heights, 0.7, low,
             color=_PALE_BLUE, edgecolor=_BLUE, label="mean - std to mean + std", zorder=3)  # fmt: skip


def _open_boxes(axes: Axes, layers: list[LayerGradients], bottom: float) -> None:
    """Draw boxes of layers whose mean - std is below the minimum; their lower half is pale and ends at the minimum."""
    if not layers:
        return
    positions, mean = [layer.layer for layer in layers], [layer.mean for layer in layers]
    low = [max(layer.minimum, bottom) for layer in layers]
    axes.bar(positions, [m - edge for m, edge in zip(mean, low, strict=True)], 0.7, low,
             color=_FAINT_BLUE, label="mean - std is below the minimum", zorder=1)  # fmt: skip
    axes.bar(positions, [layer.std for layer in layers], 0.7, mean,
             color=_PALE_BLUE, edgecolor=_BLUE, label="mean - std to mean + std", zorder=3)  # fmt: skip


def _line(axes: Axes, layers: list[LayerGradients], values: list[float], *, color: Any, marker: str,
          label: str | None) -> None:  # fmt: skip
    """Draw a line through the positive values; zeros, absent from a log scale, are gaps with crosses at the bottom."""
    positions = range(layers[0].layer, layers[-1].layer + 1)
    known = {layer.layer: value for layer, value in zip(layers, values, strict=True)}
    shown = [known.get(position, 0.0) or math.nan for position in positions]
    size = 5.0 if len(positions) <= 40 else 3.5
    axes.plot(positions, shown, color=color, marker=marker, markersize=size, linewidth=1.3, label=label)
    if zeros := [position for position, value in known.items() if value == 0.0]:
        axes.plot(zeros, [0.02] * len(zeros), linestyle="none", marker="x", color=color, markersize=size + 1.0,
                  label=_ZERO, transform=axes.get_xaxis_transform())  # fmt: skip


def _color_scale(values: Any) -> Normalize:
    """Scale colours from the smallest to the largest finite value, half a decade further each way if they are equal."""
    if np.isnan(values).all():
        return Normalize(-1.0, 0.0)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = 0.5 if high - low < 1e-3 else 0.0
    return Normalize(low - margin, high + margin)


def _hatch(axes: Axes, cells: Any, first: int, label: str, style: dict[str, Any]) -> Patch | None:
    """Hatch the True cells of an image; return a patch for the legend, or None if no cell is True."""
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
) -> None:
    """Mark vanishing, zero and frozen layers above the axes, put the verdict into the title and add the legend."""
    marked = [layer.layer for layer in diagnosis.layers if diagnosis.mark(layer)]
    if marked:
        axes.plot(marked, [1.02] * len(marked), linestyle="none", marker="v", color=_VERMILLION,
                  markeredgecolor="black", markersize=6, clip_on=False, label=_MARKED,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    text = f"Gradient ratio (largest layer mean / smallest) {diagnosis.ratio:.1f}: {diagnosis.verdict}. "
    text += f"Marked layers: {diagnosis.marked_layers()}." if marked else "No layer's gradients vanish."
    lines = [title, *textwrap.wrap(text, int(figure.get_figwidth() * 13.0))]
    figure.suptitle("\n".join(lines), x=0.01, horizontalalignment="left", fontsize="medium")
    _legend(figure, *axes.get_legend_handles_labels(), extra)


def _legend(figure: Figure, handles: list[Artist], labels: list[str], extra: Sequence[Patch]) -> None:
    """Add a legend below the axes: each label once, in as many columns as fit."""
    entries = dict(zip(labels, handles, strict=True)) | {str(patch.get_label()): patch for patch in extra}
    if not entries:
        return
    ordered = sorted(entries, key=lambda label: label in (_NO_GRADIENT, _ZERO, _MARKED))
    # Estimated widths in inches: 0.065 per letter, 0.7 for symbol and gap.
    columns = int(figure.get_figwidth() / (0.065 * max(map(len, ordered)) + 0.7))
    figure.legend(
        [entries[label] for label in ordered], ordered,
        loc="outside lower left", ncols=max(1, min(columns, 4)), frameon=False, fontsize="small",
    )  # fmt: skip
