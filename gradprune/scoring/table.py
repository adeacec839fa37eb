"""`GroupTable`: all prunable groups of a model, stored column by column in the order (layer, kind, index)."""

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gradprune.models import KINDS, BlockKey, PrunableModel
from gradprune.models.kinds import KIND_NAMES
from gradprune.models.masks import GroupMasks
from gradprune.models.widths import plain_widths


@dataclass(frozen=True)
class GroupTable:
    """One row per group; all columns have the same length.

    layer, index: int64. kind: int64, index into `KINDS`. cost: int64, parameters removed with the group.
    importance: float64, as the engine computed it.
    prior: float64, the H-GSP prior of the group's block or layer; NaN at temperature 0, which uses no priors.
    score: float64, importance / cost (normalised if asked for) * modulation; selection sorts by it.
    layers: number of decoder layers of the model.
    plain_widths: by kind, the numbers of groups that a set of a block may have in a plain checkpoint of the model's
        architecture; a kind that is missing here may have any number.
    sets: by kind, the number of parts of a block's groups that must keep equally many groups each, see `Block.sets`;
        kinds with one part are left out.
    follows: by kind, the number of its groups that are removed with each channel of the routed experts (for shared
        experts whose width the configuration states as that multiple); kinds that are pruned independently are left
        out.
    removed: by kind, the number of layers whose block an earlier pruning removed; kinds that lost none are left out.
    """

    layer: NDArray[np.int64]
    kind: NDArray[np.int64]
    index: NDArray[np.int64]
    cost: NDArray[np.int64]
    importance: NDArray[np.float64]
    prior: NDArray[np.float64]
    score: NDArray[np.float64]
    layers: int
    plain_widths: Mapping[str, frozenset[int]] = field(default_factory=dict)
    sets: Mapping[str, int] = field(default_factory=dict)
    follows: Mapping[str, int] = field(default_factory=dict)
    removed: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.layer)

    def blocks(self) -> list[tuple[BlockKey, slice]]:
        """Return each block with the slice of its rows, which are consecutive."""
        numbers, starts, counts = np.unique(self.layer * len(KINDS) + self.kind, return_index=True, return_counts=True)
        return [
            (BlockKey(number // len(KINDS), KIND_NAMES[number % len(KINDS)]), slice(start, start + count))
            for number, start, count in zip(numbers.tolist(), starts.tolist(), counts.tolist(), strict=True)
        ]

    def masks(self, pruned: NDArray[np.bool_]) -> GroupMasks:
        """Return the masks of what each block keeps if the groups marked in `pruned` ([len(self)] bool) are removed."""
        return GroupMasks({key: torch.from_numpy(~pruned[rows]) for key, rows in self.blocks()}, self.layers)

    def write_csv(self, path: Path, pruned: NDArray[np.bool_]) -> None:
        """Write `layer,kind,index,importance,cost,prior,score,pruned`; floats round-trip; a NaN prior is left empty."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["layer", "kind", "index", "importance", "cost", "prior", "score", "pruned"])
            columns = (
                self.layer.tolist(),
                [KIND_NAMES[kind] for kind in self.kind],
                self.index.tolist(),
                self.importance.tolist(),
                self.cost.tolist(),
                ["" if np.isnan(prior) else prior for prior in self.prior.tolist()],
                self.score.tolist(),
                pruned.astype(int).tolist(),
            )
            writer.writerows(zip(*columns, strict=True))


def empty_table(view: PrunableModel) -> GroupTable:
    """Return the table of a model's groups before calibration: importances and scores are 0, priors NaN."""
    sizes = [block.groups for block in view.blocks]
    empty = np.zeros(sum(sizes))
    return GroupTable(
        layer=np.repeat(np.array([block.layer for block in view.blocks], np.int64), sizes),
        kind=np.repeat(np.array([KINDS.index(block.kind) for block in view.blocks], np.int64), sizes),
        index=np.concatenate([np.arange(size, dtype=np.int64) for size in sizes]),
        cost=np.repeat(np.array([block.cost for block in view.blocks], np.int64), sizes),
        importance=empty,
        prior=np.full(len(empty), np.nan),
        score=empty.copy(),
        layers=len(view.layers),
        plain_widths=plain_widths(view),
        sets={block.kind.name: block.sets for block in view.blocks if block.sets > 1},
        follows={block.kind.name: block.follows for block in view.linear_blocks if block.follows},
        removed=Counter(key.kind for key in view.dropped),
    )
