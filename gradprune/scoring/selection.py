"""Global selection: which groups go, so that the model shrinks by the ratio asked for.

Groups are sorted by score, ascending and stable (ties by layer, kind, index), and taken while their summed cost
stays within the budget; one that no longer fits is skipped and smaller ones are still tried.

Under `round_to` and `uniform` groups go in chunks: the lowest-scored channels of a layer that bring its width to
the next multiple, or the groups of the same rank in every layer. A chunk's score is the mean of its groups', and
the chunks of one chain go in order.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradprune.config import Constraints
from gradprune.errors import ConfigError, SelectionError
from gradprune.models.blocks import KINDS
from gradprune.scoring.table import GroupTable


@dataclass(frozen=True)
class _Chunks:
    """Which groups go together.

    of_group: [len(table)] int64, the chunk of each group, -1 where it may not go; numbered by (layer, kind, rank).
    chain: per chunk, the chain whose order it keeps.
    owner: per chunk, whose limit it counts against: its layer, or 0 where a chunk spans all layers.
    """

    of_group: NDArray[np.int64]
    chain: list[int]
    owner: list[int]


def select(
    table: GroupTable,
    ratio: float,
    parameters: int,
    constraints: Constraints,
    kept_kv_groups: frozenset[int] | None = None,
) -> NDArray[np.bool_]:
    """Choose the groups to prune.

    Args:
        table: the groups with their scores.
        ratio: fraction of `parameters` to remove.
        parameters: parameters of the whole model, tied ones counted once.
        constraints: what limits the choice.
        kept_kv_groups: under `uniform`, the numbers of KV groups per layer that the architecture's configuration can
            state; None for any.

    Returns:
        [len(table)] bool, True for a group to prune. Its cost stays within ratio * parameters, unless layers
        fall below `epsilon` and go whole.

    Raises:
        SelectionError: the ratio cannot be reached under the constraints; says what can.
        ConfigError: `uniform` on a model whose layers differ.
    """
    chunks = _chunks(table, constraints, kept_kv_groups)
    limits = _limits(table, constraints)
    budget = ratio * parameters
    costs = _sum_by_chunk(table.cost, chunks)
    reachable = np.minimum(np.bincount(chunks.owner, costs, len(limits)), limits).sum()
    if budget > reachable or budget >= table.cost.sum():
        raise SelectionError(
            f"pruning_ratio: {ratio:g} cannot be reached; the groups that may go hold {reachable / parameters:.4f} "
            f"of the model's {parameters:,} parameters (embeddings, norms, the head, frozen layers and what "
            "max_layer_ratio or uniform keep are not among them)"
        )
    pruned = _take(table, chunks, costs, limits, budget)
    if constraints.epsilon > 0.0:
        _drop_thin_layers(table, pruned, constraints.epsilon)
    return pruned


def check_reachable(
    table: GroupTable,
    ratio: float,
    parameters: int,
    constraints: Constraints,
    kept_kv_groups: frozenset[int] | None = None,
) -> None:
    """Raise what `select` would for this ratio, before any score is known."""
    select(table, ratio, parameters, constraints, kept_kv_groups)


def _take(
    table: GroupTable, chunks: _Chunks, costs: NDArray[np.float64], limits: NDArray[np.float64], budget: float
) -> NDArray[np.bool_]:
    scores = _sum_by_chunk(table.score, chunks) / _sum_by_chunk(np.ones(len(table)), chunks)
    taken = np.zeros(len(costs), np.bool_)
    # Plain Python numbers: a model has up to a million groups, and indexing NumPy scalars would dominate.
    cost_of, room, left = costs.tolist(), limits.tolist(), budget
    broken_chains: set[int] = set()
    for chunk in np.argsort(scores, kind="stable").tolist():
        cost, chain, owner = cost_of[chunk], chunks.chain[chunk], chunks.owner[chunk]
        if chain in broken_chains:
            continue
        if cost > left or cost > room[owner]:
            broken_chains.add(chain)
            continue
        taken[chunk] = True
        left -= cost
        room[owner] -= cost
    eligible = chunks.of_group >= 0
    return eligible & taken[np.where(eligible, chunks.of_group, 0)]


def _sum_by_chunk(values: NDArray[np.float64] | NDArray[np.int64], chunks: _Chunks) -> NDArray[np.float64]:
    eligible = chunks.of_group >= 0
    sums: NDArray[np.float64] = np.bincount(chunks.of_group[eligible], values[eligible], len(chunks.chain)).astype(
        np.float64
    )
    return sums


def _chunks(table: GroupTable, constraints: Constraints, kept_kv_groups: frozenset[int] | None) -> _Chunks:
    if constraints.uniform:
        return _uniform_chunks(table, constraints, kept_kv_groups)
    of_group = np.full(len(table), -1, np.int64)
    chain: list[int] = []
    owner: list[int] = []
    first, last = constraints.freeze_first_n_layers, table.layers - constraints.freeze_last_n_layers
    for block, (layer, kind, rows) in enumerate(_blocks(table)):
        if not first <= layer < last:
            continue
        width = rows.stop - rows.start
        number = np.arange(width)
        if KINDS[kind] == "mlp" and constraints.round_to > 1:
            # The first chunk is the remainder: without it the width is a multiple already.
            number = (_ranks(table.score[rows]) + -width % constraints.round_to) // constraints.round_to
        of_group[rows] = len(chain) + number
        count = int(number.max()) + 1
        chain += [block] * count
        owner += [layer] * count
    return _Chunks(of_group, chain, owner)


def _uniform_chunks(table: GroupTable, constraints: Constraints, kept_kv_groups: frozenset[int] | None) -> _Chunks:
    """Chunks of the same ranks in every layer; at least one group of each kind stays in each layer."""
    of_group = np.full(len(table), -1, np.int64)
    chain: list[int] = []
    for kind, name in enumerate(KINDS):
        blocks = [rows for _, of_kind, rows in _blocks(table) if of_kind == kind]
        widths = sorted({rows.stop - rows.start for rows in blocks})
        if len(widths) != 1 or len(blocks) != table.layers:
            raise ConfigError(f"uniform: the layers of this model already differ in their {name} widths: {widths}")
        width = widths[0]
        if name == "mlp":
            kept = list(range(constraints.round_to, width, constraints.round_to))
        else:
            kept = sorted((kept_kv_groups or frozenset(range(1, width))) & frozenset(range(1, width)))
        ends = np.array([width - count for count in reversed(kept)], np.int64)
        for rows in blocks:
            number = np.searchsorted(ends, _ranks(table.score[rows]), side="right")
            of_group[rows] = np.where(number < len(ends), len(chain) + number, -1)
        chain += [kind] * len(ends)
    return _Chunks(of_group, chain, owner=[0] * len(chain))


def _blocks(table: GroupTable) -> list[tuple[int, int, slice]]:
    """Each block's layer, kind and rows; a block's rows are consecutive."""
    keys, starts, counts = np.unique(table.layer * len(KINDS) + table.kind, return_index=True, return_counts=True)
    return [
        (int(key) // len(KINDS), int(key) % len(KINDS), slice(int(start), int(start + count)))
        for key, start, count in zip(keys, starts, counts, strict=True)
    ]


def _ranks(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Position of each score in ascending order, stable."""
    ranks = np.empty(len(scores), np.int64)
    ranks[np.argsort(scores, kind="stable")] = np.arange(len(scores))
    return ranks


def _limits(table: GroupTable, constraints: Constraints) -> NDArray[np.float64]:
    """Parameters that may go, per owner of chunks."""
    of_layer = np.bincount(table.layer, table.cost, table.layers)
    limits: NDArray[np.float64] = constraints.max_layer_ratio * of_layer.astype(np.float64)
    return limits.sum(keepdims=True) if constraints.uniform else limits


def _drop_thin_layers(table: GroupTable, pruned: NDArray[np.bool_], epsilon: float) -> None:
    """Remove whole each layer whose mean of attention-kept and MLP-kept fractions is below epsilon."""
    for layer in range(table.layers):
        of_layer = table.layer == layer
        kept = [
            1.0 - pruned[of_layer & (table.kind == kind)].mean()
            for kind in range(len(KINDS))
            if (of_layer & (table.kind == kind)).any()
        ]
        if kept and np.mean(kept) < epsilon:
            pruned[of_layer] = True
