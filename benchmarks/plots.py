"""Plots of results as SVG files: the same records make the same bytes."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from benchmarks.results import Record

# Ours, then the floor in grey, then everyone else.
_OURS, _FLOOR, _OTHERS = "#c1272d", "#777777", ("#0000a7", "#eecc16", "#008176", "#b35806", "#5e3c99", "#c77cba")
# Sizes of the kernels' work are shown in these units.
_MEGA, _GIGA = 1e6, 1e9


def kernel_plot(records: Sequence[Record], path: Path) -> None:
    """Rate against size, a panel an element type; the floor is a line.

    Args:
        records: of one op on one hardware.
        path: of the SVG file.
    """
    dtypes = sorted({found.dtype for found in records})
    figure, axes = _figure(len(dtypes))
    bound_by_arithmetic = any(found.tflops is not None for found in records)
    for axis, dtype in zip(axes, dtypes, strict=True):
        points = defaultdict(list)
        for found in records:
            rate = found.tflops if bound_by_arithmetic else found.gb_per_s
            size = found.flops if bound_by_arithmetic else found.bytes
            if found.dtype == dtype and rate is not None and size is not None:
                size /= _GIGA if bound_by_arithmetic else _MEGA
                points[found.provider, bool(found.extra.get("floor"))].append((size, rate))
        others = iter(_OTHERS * 3)
        for (provider, floor), values in sorted(points.items()):
            x, y = zip(*sorted(values), strict=True)
            ours = provider.startswith("gradprune")
            color = _FLOOR if floor else _OURS if ours else next(others)
            axis.plot(x, y, "-" if floor else "o", color=color, label=provider, markersize=5 if ours else 4)
        axis.set(xscale="log", title=dtype, xlabel="GFLOP" if bound_by_arithmetic else "MB")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(bottom=0.0)
    _finish(figure, axes, "TFLOP/s" if bound_by_arithmetic else "GB/s", path)


def quality_plot(records: Sequence[Record], path: Path) -> None:
    """Mean perplexity against parameters kept, a line a provider, with and without H-GSP in panels.

    Args:
        records: of one model on one hardware.
        path: of the SVG file.
    """
    panels = {"without H-GSP": "T=1", "with H-GSP (T=1)": "T=0"}
    figure, axes = _figure(len(panels))
    for axis, (title, left_out) in zip(axes, panels.items(), strict=True):
        _quality_panel(axis, [found for found in records if not found.provider.endswith(left_out)])
        axis.set(title=title, xlabel="parameters kept", yscale="log")
        axis.invert_xaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=6)
    _finish(figure, axes, "perplexity", path, legends=False)


def growth_plot(records: Sequence[Record], path: Path) -> None:
    """Milliseconds and bytes against the axis of growth, on logarithmic scales.

    Args:
        records: of one axis on one hardware.
        path: of the SVG file.
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
    _finish(figure, axes, "", path)


def _quality_panel(axis: Axes, records: Sequence[Record]) -> None:
    """A colour a method, dotted where nothing is repaired; others are black."""
    values = defaultdict(lambda: defaultdict(list))
    for found in records:
        if found.provider != "dense":
            values[found.provider][found.extra["ratio"]].append((found.extra["kept"], found.extra["perplexity"]))
    dense = [found.extra["perplexity"] for found in records if found.provider == "dense"]
    colors: dict[str, str] = {}
    for provider, by_ratio in sorted(values.items()):
        points = [tuple(map(fmean, zip(*pairs, strict=True))) for _, pairs in sorted(by_ratio.items())]
        points = [(1.0, dense[0]), *points] if dense else points
        x, y = zip(*points, strict=True)
        label = provider.removeprefix("gradprune ").split(" T=")[0]
        method, *repair = label.split(" + ")
        if provider.startswith("gradprune"):
            color = _OURS if method == "search" else colors.setdefault(method, _OTHERS[len(colors) % len(_OTHERS)])
            style = "o-" if repair else "o:"
        else:
            color, style = "black", "--"
        axis.plot(x, y, style, color=color, label=label, markersize=3)


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    # A Figure of its own knows no global state and needs no display.
    figure = Figure(figsize=(4.2 * panels, 3.4), layout="constrained")
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    return figure, axes


def _finish(figure: Figure, axes: Sequence[Axes], label: str, path: Path, *, legends: bool = True) -> None:
    axes[0].set_ylabel(label)
    for axis in axes:
        axis.grid(alpha=0.3)
        if legends and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "gradprune"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
