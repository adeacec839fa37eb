"""The kinds of prunable blocks, as data: all that other code needs to know about a kind."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Kind:
    """A kind of block.

    name: in `groups.csv`, in JSON files and in the `skip` list of a pruned checkpoint's `per_layer_config`.
    groups: what its groups are called in tables.
    legend: the same in charts.
    unit: what its groups are called in `summary.json`.
    rounded: `round_to` applies to the number of groups a block keeps.
    factor: the option that multiplies the scores of its groups; None where there is none.
    optional: most models have no block of it, which goes without saying.
    default: pruned unless `prune_kinds` says otherwise.
    multiple: a block keeps a multiple of this many groups, if it has one.
    """

    name: str
    groups: str
    legend: str
    unit: str
    rounded: bool = False
    factor: str | None = None
    optional: bool = False
    default: bool = True
    multiple: int = 1


KINDS: tuple[Kind, ...] = (
    Kind("attention", "KV groups", "attention (KV groups)", "groups", factor="attention_factor"),
    Kind("mlp", "MLP channels", "MLP (channels)", "channels", rounded=True),
    # Grouped matrix products, by which experts are run, take rows of whole 16 bytes only.
    Kind(
        "expert_channels",
        "expert channels",
        "experts (channels)",
        "channels of experts",
        rounded=True,
        optional=True,
        multiple=8,
    ),
    Kind("experts", "experts", "experts (whole)", "experts", optional=True, default=False),
    Kind(
        "shared_experts",
        "shared experts' channels",
        "shared experts (channels)",
        "channels of shared experts",
        rounded=True,
        optional=True,
    ),
)
"""In the order in which a decoder layer's blocks add to the residual stream; `GroupTable.kind` indexes it."""

KIND_NAMES: tuple[str, ...] = tuple(kind.name for kind in KINDS)
DEFAULT_KINDS: tuple[str, ...] = tuple(kind.name for kind in KINDS if kind.default)


def shown_kinds(names: Iterable[str]) -> tuple[Kind, ...]:
    """What tables and files have columns for; names: of the kinds of which a model has blocks."""
    present = set(names)
    return tuple(kind for kind in KINDS if not kind.optional or kind.name in present)


class BlockKey(NamedTuple):
    """Which block: its decoder layer and its kind's name."""

    layer: int
    kind: str
