"""Over-pruning: the fraction of its groups that each block loses, and a warning if some blocks lose nearly all."""

from dataclasses import dataclass
from typing import Any

from gradprune.config import PruneConfig
from gradprune.models import BlockKey, shown_kinds
from gradprune.models.masks import GroupMasks

# A block is over-pruned if it loses more than the fraction _MOST while another block loses less than _LEAST.
_MOST, _LEAST = 0.9, 0.1


@dataclass(frozen=True)
class LayerPruning:
    """The fractions of its groups that a decoder layer loses.

    pruned: by name of the kind of block, the fraction of the block's groups that were removed; None if the layer has no
        such block.
    """

    layer: int
    pruned: dict[str, float | None]


def pruning_distribution(masks: GroupMasks) -> list[LayerPruning]:
    """Return the fractions of its groups that each layer loses."""
    # Divide integer counts, so that the fraction for a tenth of the groups equals the literal 0.1 exactly.
    lost = {key: int((~masks[key]).sum()) / len(masks[key]) for key in masks}
    kinds = shown_kinds(key.kind for key in masks)
    return [
        LayerPruning(layer, {kind.name: lost.get(BlockKey(layer, kind.name)) for kind in kinds})
        for layer in range(masks.layers)
    ]


def over_pruned(distribution: list[LayerPruning]) -> list[str]:
    """Return the blocks that lose over 90 % while another loses under 10 %, as texts such as "layer 3 mlp (99%)"."""
    blocks = [
        (f"layer {layer.layer} {kind}", fraction)
        for layer in distribution
        for kind, fraction in layer.pruned.items()
        if fraction is not None
    ]
    if not any(fraction < _LEAST for _, fraction in blocks):
        return []
    return [f"{name} ({fraction:.0%})" for name, fraction in blocks if fraction > _MOST]


def pruning_warning(distribution: list[LayerPruning], config: PruneConfig) -> str | None:
    """Return a warning that names the over-pruned blocks and what to try next; None if no block is over-pruned."""
    blocks = over_pruned(distribution)
    if not blocks:
        return None
    return f"Over-pruned while other blocks lose under {_LEAST:.0%}: {', '.join(blocks)}. {_next_step(config)}"


def to_json(distribution: list[LayerPruning]) -> list[dict[str, Any]]:
    """Return the distribution as it is stored in `analysis/gradients.json`."""
    return [
        {"layer": layer.layer, **{f"{kind}_pruned": fraction for kind, fraction in layer.pruned.items()}}
        for layer in distribution
    ]


def _next_step(config: PruneConfig) -> str:
    """Advise what `benchmarks/README.md` found better: no H-GSP, bounded scales, repair; else search or limits."""
    if config.temperature != 0.0:
        return "Try --temperature 0: H-GSP removes most from the blocks whose prior is low."
    if "normalize" in config.gradient_fix:
        return "Try --gradient_fix adaptive: it scales each layer by at most 10, while normalize has no limit."
    if config.repair == "none":
        return "Try --repair least_squares."
    return "Let gradprune search choose by held-out loss, or set limits: --max_layer_ratio, --freeze_first_n_layers."
