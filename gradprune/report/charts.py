"""Charts of the HTML report."""

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours stay apart for colour-blind readers.
COLORS = {"attention": "#0072B2", "mlp": "#E69F00"}


def kept_chart(layers: list[dict[str, Any]]) -> str:
    """An SVG bar chart of the fraction of KV groups and MLP channels that each layer keeps."""
    figure = Figure(figsize=(min(max(6.0, 0.35 * len(layers)), 16.0), 3.2), layout="constrained")
    axes = figure.add_subplot()
    positions = range(len(layers))
    for shift, name, total in ((-0.2, "attention", "groups"), (0.2, "mlp", "channels")):
        kept = [layer[name]["kept"] / layer[name][total] if layer[name][total] else 0.0 for layer in layers]
        label = {"attention": "attention (KV groups)", "mlp": "MLP (channels)"}[name]
        axes.bar([position + shift for position in positions], kept, 0.4, label=label, color=COLORS[name])
    axes.set(xlabel="decoder layer", ylabel="fraction kept", ylim=(0.0, 1.0), xlim=(-0.6, len(layers) - 0.4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return svg(figure)


def svg(figure: Figure) -> str:
    """The figure as an SVG element, the same bytes every time."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "gradprune"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
