"""The chart of what each layer keeps, as an SVG element."""

import re
from typing import Any

import pytest

from gradprune.report.charts import kept_chart

UNITS = {
    "attention": "groups",
    "mlp": "channels",
    "expert_channels": "channels of experts",
    "shared_experts": "channels of shared experts",
}


def layers_of(number: int, *kinds: str) -> list[dict[str, Any]]:
    """Layers that keep half of each kind of block, as in `summary.json`."""
    return [{"layer": layer, **{kind: {UNITS[kind]: 8, "kept": 4} for kind in kinds}} for layer in range(number)]


@pytest.mark.parametrize("layers", [1, 2, 5, 40])
def test_every_layer_is_labelled_with_its_number(layers: int) -> None:
    # Matplotlib draws text as outlines, and puts the text itself in a comment beside them.
    texts = re.findall(r"<!-- (.*?) -->", kept_chart(layers_of(layers, "attention", "mlp")))
    assert texts[: texts.index("decoder layer")] == [str(layer) for layer in range(layers)]


@pytest.mark.parametrize("layers", [1, 4, 40])
def test_many_kinds_of_blocks_leave_room_for_the_bars(layers: int) -> None:
    chart = kept_chart(layers_of(layers, *UNITS))
    figure, axes = (
        [float(x) for x in re.findall(r"[ML] (\S+) ", re.search(rf'id="{name}">\s*<path d="(.*?)z', chart, re.S)[1])]
        for name in ("patch_1", "patch_2")
    )
    assert max(axes) - min(axes) > 0.8 * (max(figure) - min(figure))
    legend = chart[chart.index('id="legend_1"') :]
    places = [float(x) for x in re.findall(r"translate\((\S+) \S+\) scale", legend)]
    assert places
    assert min(figure) <= min(places)
    assert max(places) <= 0.9 * max(figure)
