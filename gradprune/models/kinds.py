"""The kinds of prunable blocks, as data: the properties by which other code tells one kind from another."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Kind:
    """A kind of block.

    name: its name in `groups.csv`, in JSON files and in the `skip` list of a pruned checkpoint's `per_layer_config`.
    groups: the name of its groups in tables.
    legend: its name in the legends of charts.
    unit: the key of its number of groups in `summary.json`.
    rounded: whether `round_to` applies to the number of groups that a block keeps.
    factor: the option that multiplies the scores of its groups; None if there is none.
    optional: whether most models have no block of this kind, so that its absence is not mentioned.
    default: whether it is pruned unless `prune_kinds` says otherwise.
    multiple: if a block's number of groups is a multiple of this, so is the number that it keeps.
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
    # Experts are run by grouped matrix products, which require rows whose size is a multiple of 16 bytes.
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
"""All kinds, in the order in which a layer's blocks add to the residual stream; `GroupTable.kind` indexes this."""

KIND_NAMES: tuple[str, ...] = tuple(kind.name for kind in KINDS)
DEFAULT_KINDS: tuple[str, ...] = tuple(kind.name for kind in KINDS if kind.default)


def shown_kinds(names: Iterable[str]) -> tuple[Kind, ...]:
    """The kinds that tables and files show; names: the kinds of the model's blocks."""
    present = set(names)
    return tuple(kind for kind in KINDS if not kind.optional or kind.name in present)


class BlockKey(NamedTuple):
    """Identifies a block by the index of its decoder layer and the name of its kind."""

    layer: int
    kind: str
