"""Plots of results as SVG files; the same records always give the same bytes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullFormatter, NullLocator, ScalarFormatter

from benchmarks.results import Record

# Colours: this project, the floor, everyone else.
_OURS, _FLOOR, _OTHERS = (
    "#c1272d",
    "#777777",
    ("#0000a7", "#eecc16", "#008176", "#b35806", "#5e3c99", "#c77cba", "#56b4e9"),
)
_FLOOR_DASHES = ("-", "--", ":")
_PEER_DASHES = ("--", "-.", ":", (0, (5, 1)), (0, (1, 3)), (0, (3, 1, 1, 1)))


def kernel_plot(records: Sequence[Record], path: Path) -> None:
    """Plot the rate of an op against its size, one panel per dtype; floors are drawn as lines.

    Args:
        records: the records of one op on one machine.
        path: the SVG file to write.
    """
    dtypes = sorted({found.dtype for found in records})
    figure, axes = _figure(len(dtypes))
    bound_by_arithmetic = any(found.tflops is not None for found in records)
    unit, work, rates = (1e9, "GFLOP", "TFLOP/s") if bound_by_arithmetic else (1e6, "MB", "GB/s")
    for axis, dtype in zip(axes, dtypes, strict=True):
        points = defaultdict(list)
        for found in records:
            rate = found.tflops if bound_by_arithmetic else found.gb_per_s
            size = found.flops if bound_by_arithmetic else found.bytes
            if found.dtype == dtype and rate is not None and size is not None:
                points[found.provider, bool(found.extra.get("floor"))].append((size / unit, rate))
        others, dashes = iter(_OTHERS * 3), cycle(_FLOOR_DASHES)
        for (provider, floor), values in sorted(points.items()):
            x, y = zip(*sorted(values), strict=True)
            ours = provider.startswith("gradprune")
            color = _FLOOR if floor else _OURS if ours else next(others)
            axis.plot(x, y, next(dashes) if floor else "o", color=color, label=provider, markersize=5 if ours else 4)
        axis.set(xscale="log", title=dtype, xlabel=work)
        _plain_numbers(axis.xaxis)
        axis.set_ylim(bottom=0.0)
    _finish(figure, axes, rates, path)


def quality_plot(records: Sequence[Record], path: Path) -> None:
    """Plot mean perplexity against parameters kept: one line per provider, a panel without and one with H-GSP.

    Each method has its own colour. Its line is solid with repair and dotted without; its markers are diamonds if the
    model is also distilled and squares if it is pruned in several shots. Peers are black, each with its own dashes.

    Args:
        records: the records of one model.
        path: the SVG file to write.
    """
    panels = {"without H-GSP": "T=1", "with H-GSP (T=1)": "T=0"}
    if not any(found.provider.endswith("T=1") for found in records):
        del panels["with H-GSP (T=1)"]
    figure, axes = _figure(len(panels), width=4.2 if len(panels) > 1 else 6.4, share=True)
    methods = sorted(
        {_method(found.provider) for found in records if found.provider.startswith("gradprune")} - {"search"}
    )
    colors = {"search": _OURS, **dict(zip(methods, cycle(_OTHERS), strict=False))}
    for axis, (title, left_out) in zip(axes, panels.items(), strict=True):
        _quality_panel(axis, [found for found in records if not found.provider.endswith(left_out)], colors)
        axis.set(title=title, xlabel="parameters kept")
        _size_axes(axis)
    lines = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=6, handlelength=5)
    _finish(figure, axes, "perplexity", path)


def size_plot(points: Mapping[str, Sequence[tuple[float, float]]], names: Mapping[str, str], path: Path) -> None:
    """Draw README.md's picture: perplexity against size, one line per provider.

    Lines of this project are coloured, solid with repair and dotted without; those of peers are black and dashed.

    Args:
        points: for each provider, (fraction of the parameters kept, perplexity), beginning with the dense model.
        names: for each provider to draw, its name in the legend, best first.
        path: the SVG file to write.
    """
    figure, (axis,) = _figure(1, width=6.4)
    colors = iter((_OURS, *_OTHERS))
    for provider, name in names.items():
        if provider not in points:
            continue
        x, y = zip(*points[provider], strict=True)
        ours = provider.startswith("gradprune")
        style = ("o-" if " + " in provider or "search" in provider else "o:") if ours else "s--"
        color = next(colors) if ours else "black"
        axis.plot([100.0 * kept for kept in x], y, style, color=color, label=name.replace("`", ""), markersize=4)
    if points:
        dense = next(iter(points.values()))[0][1]
        axis.axhline(dense, color=_FLOOR, linewidth=0.8, zorder=0, label=f"dense, {dense:.2f}")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    axis.set(xlabel="parameters kept, %")
    _size_axes(axis)
    _finish(figure, [axis], "held-out perplexity", path)


def growth_plot(records: Sequence[Record], path: Path) -> None:
    """Plot time and peak memory against the quantity that grows, on logarithmic scales.

    Args:
        records: the records of one growing quantity on one machine.
        path: the SVG file to write.
    """
    figure, axes = _figure(2)
    for axis, (title, value_of) in zip(
        axes, {"ms": lambda r: r.ms_p50, "peak MiB": lambda r: (r.peak_memory or 0) / 2**20}.items(), strict=True
    ):
        points = defaultdict(list)
        for found in records:
            if value_of(found):
                points[found.provider].append((found.extra["x"], value_of(found)))
        for provider, values in sorted(points.items()):
            x, y = zip(*sorted(values), strict=True)
            axis.plot(x, y, "o-", color=_OURS if provider.startswith("gradprune") else _FLOOR, label=provider)
        axis.set(xscale="log", yscale="log", title=title, xlabel=records[0].extra["axis"])
        _plain_numbers(axis.yaxis)
        axis.xaxis.set_major_locator(FixedLocator(sorted({found.extra["x"] for found in records})))
        axis.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
        axis.xaxis.set_minor_locator(NullLocator())
    _finish(figure, axes, "", path)


def _quality_panel(axis: Axes, records: Sequence[Record], colors: Mapping[str, str]) -> None:
    values = defaultdict(lambda: defaultdict(list))
    for found in records:
        if found.provider != "dense":
            values[found.provider][found.extra["ratio"]].append((found.extra["kept"], found.extra["perplexity"]))
    dense = [found.extra["perplexity"] for found in records if found.provider == "dense"]
    ratios = {ratio for by_ratio in values.values() for ratio in by_ratio}
    dashes = cycle(_PEER_DASHES)
    for provider, by_ratio in sorted(values.items()):
        points = [tuple(map(fmean, zip(*pairs, strict=True))) for _, pairs in sorted(by_ratio.items())]
        # A provider measured at only one of several ratios is a single point: a line from the dense model to it would
        # pass over ratios at which it was not measured.
        single = len(by_ratio) == 1 < len(ratios)
        points = [(1.0, dense[0]), *points] if dense and not single else points
        x, y = zip(*points, strict=True)
        ours, repaired = provider.startswith("gradprune"), " + " in provider
        marker = "D" if "distillation" in provider else "s" if "shots" in provider else "o"
        style = marker + ("-" if repaired else ":") if ours else "x" * single
        color = colors[_method(provider)] if ours else "black"
        label = provider.removeprefix("gradprune ").split(" T=")[0]
        (line,) = axis.plot(x, y, style, color=color, label=label, markersize=3)
        if not ours:
            line.set_linestyle(next(dashes))


def _size_axes(axis: Axes) -> None:
    """Make the perplexity scale logarithmic with plain numbers, and let sizes fall from the dense model on the left."""
    axis.set(yscale="log")
    _plain_numbers(axis.yaxis)
    axis.invert_xaxis()


def _plain_numbers(axis: Axis) -> None:
    """Put the ticks of a logarithmic axis at 1, 2 and 5 times powers of ten, written as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def _method(provider: str) -> str:
    """The method in the name of a provider of this project: "taylor" in "gradprune taylor + least squares T=1"."""
    return provider.split()[1]


def _figure(panels: int, width: float = 4.2, *, share: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels side by side, each `width` inches wide; `share` gives all the same vertical scale."""
    # A Figure made without pyplot has no global state and needs no display.
    figure = Figure(figsize=(width * panels, 3.4), layout="constrained")
    return figure, list(figure.subplots(1, panels, sharey=share, squeeze=False)[0])


def _finish(figure: Figure, axes: Sequence[Axes], label: str, path: Path) -> None:
    axes[0].set_ylabel(label)
    for axis in axes:
        axis.grid(alpha=0.3)
        if not figure.legends and axis.get_legend() is None and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "gradprune"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
