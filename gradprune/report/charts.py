"""The charts of the HTML reports, as SVG."""

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from gradprune.report.plots import layer_ticks
from gradprune.report.rows import scored_kinds

# From the Okabe-Ito palette, which is safe for colour-blind readers.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


def kept_chart(layers: list[dict[str, Any]]) -> str:
    """Draw an SVG bar chart of the fraction of groups that each block keeps, by layer.

    layers: the entry "layers" of `summary.json`.
    """
    figure = Figure(figsize=(min(max(6.0, 0.35 * len(layers)), 16.0), 3.2), layout="constrained")
    axes = figure.add_subplot()
    kinds = scored_kinds(layers)
    width = 0.8 / len(kinds)
    for number, (kind, color) in enumerate(zip(kinds, COLORS[: len(kinds)], strict=True)):
        blocks = [layer[kind.name] for layer in layers]
        kept = [block["kept"] / block[kind.unit] if block[kind.unit] else 0.0 for block in blocks]
        shift = (number - (len(kinds) - 1) / 2) * width
        positions = [position + shift for position in range(len(layers))]
        axes.bar(positions, kept, width, label=kind.legend, color=color)
    axes.set(xlabel="decoder layer", ylabel="fraction kept", ylim=(0.0, 1.0), xlim=(-0.6, len(layers) - 0.4))
    axes.xaxis.set_major_locator(layer_ticks(0, len(layers) - 1))
    # More than two columns would not fit into the narrowest figure.
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return svg(figure)


def svg(figure: Figure) -> str:
    """Convert a figure to an SVG element; the same figure gives the same bytes."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "gradprune"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
