"""Global selection: which groups to prune so that the model shrinks by the requested ratio.

Groups are sorted by ascending score (ties are broken by layer, kind and index) and taken while their summed cost stays
within the budget; a group that no longer fits is skipped, and smaller ones are still tried.

Under `round_to`, `uniform` and `serve`, groups are pruned in chunks. A chunk consists of the lowest-scored channels of
a block that bring its width down to the next multiple, or of the groups of the same ranks (by score within their
block) in every layer that has them; there, each expert counts as a layer of its own. A chunk's score is the mean of its
groups' scores. The chunks of one block (under `uniform`: of one kind) form a chain and are taken in order.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gradprune.config import Constraints
from gradprune.errors import ConfigError, SelectionError, counted
from gradprune.models import KINDS
from gradprune.scoring.table import GroupTable

_ROUNDED = {kind.name for kind in KINDS if kind.rounded}


@dataclass(frozen=True)
class _Chunks:
    """The division of the groups into chunks, each of which is pruned whole or not at all.

    of_group: [len(table)] int64, the chunk of each group, or -1 if the group may not be pruned; chunks are numbered by
        (layer, kind, rank).
    chain: the number of each chunk's chain.
    layers: the layers that each chunk's groups are in; they share its cost equally.
    """

    of_group: NDArray[np.int64]
    chain: list[int]
    layers: list[tuple[int, ...]]


def select(
    table: GroupTable,
    ratio: float,
    parameters: int,
    constraints: Constraints,
) -> NDArray[np.bool_]:
    """Choose the groups to prune.

    Args:
        table: all groups with their scores.
        ratio: fraction of `parameters` to remove.
        parameters: number of parameters of the whole model; tied ones count once.
        constraints: what limits the choice.

    Returns:
        [len(table)] bool, True for a group to prune. The summed cost of these groups stays within ratio * parameters,
        unless layers that fall below `epsilon` are removed whole.

    Raises:
        SelectionError: the ratio cannot be reached under the constraints (the message says which ratio can), no block
            is left to prune, or `epsilon` would leave no layer.
        ConfigError: `uniform` is set for a model whose layers differ in width, or an option is set that cannot be used
            with a mixture of experts.
    """
    if not len(table):
        raise SelectionError("model: it has no block left that could be pruned")
    constraints = _with_experts(table, constraints)
    chunks = _chunks(table, constraints)
    limits = _limits(table, constraints)
    budget = ratio * parameters
    costs = _sum_by_chunk(table.cost, chunks)
    eligible = chunks.of_group >= 0
    of_layer = np.bincount(table.layer[eligible], table.cost[eligible], table.layers)
    reachable = np.minimum(of_layer, limits).sum()
    if budget > reachable or budget >= table.cost.sum():
        raise SelectionError(
            f"pruning_ratio: {ratio:g} cannot be reached; the groups that may be removed hold "
            f"{reachable / parameters:.4f} of the model's {parameters:,} parameters (embeddings, norms, the head, "
            "frozen layers and what max_layer_ratio, uniform or serve keep do not count)"
        )
    pruned = _take(table, chunks, costs, limits, budget)
    if constraints.epsilon > 0.0:
        _drop_thin_layers(table, pruned, constraints.epsilon)
        if pruned.all():
            raise SelectionError(
                f"epsilon: {constraints.epsilon:g} would remove every layer, since none keeps that fraction at "
                f"pruning_ratio {ratio:g}; choose a smaller one"
            )
    return pruned


def check_reachable(
    table: GroupTable,
    ratio: float,
    parameters: int,
    constraints: Constraints,
) -> None:
    """Raise the errors of `select` that do not depend on the scores, before calibration has computed any."""
    _with_experts(table, constraints)
    # Which layers fall below epsilon depends on the scores.
    select(table, ratio, parameters, replace(constraints, epsilon=0.0))


def least_cost(table: GroupTable, constraints: Constraints) -> int:
    """Return the fewest parameters that can be removed: those of one group, or of one chunk of groups."""
    chunks = _chunks(table, _with_experts(table, constraints))
    # Only the first chunk of a chain can be pruned by itself.
    _, first = np.unique(chunks.chain, return_index=True)
    return int(_sum_by_chunk(table.cost, chunks)[first].min())


def _with_experts(table: GroupTable, constraints: Constraints) -> Constraints:
    """Return the constraints, made uniform if the model is a mixture of experts.

    All layers of a mixture keep the same number of experts, of the same width, and so the same widths of everything
    else, too.

    Raises:
        ConfigError: another option contradicts that.
    """
    if not _has_experts(table):
        return constraints
    if constraints.epsilon > 0.0:
        raise ConfigError(
            f"epsilon: {constraints.epsilon:g} would drop layers, but a mixture of experts keeps them all; leave it out"
        )
    for name in ("freeze_first_n_layers", "freeze_last_n_layers"):
        if count := getattr(constraints, name):
            raise ConfigError(
                f"{name}: {count} would keep layers whole, but all layers of a mixture of experts keep the same "
                "widths; leave it out"
            )
    return replace(constraints, uniform=True)


def _has_experts(table: GroupTable) -> bool:
    return any(KINDS[kind].optional for kind in np.unique(table.kind))


def _take(
    table: GroupTable, chunks: _Chunks, costs: NDArray[np.float64], limits: NDArray[np.float64], budget: float
) -> NDArray[np.bool_]:
    scores = _sum_by_chunk(table.score, chunks) / _sum_by_chunk(np.ones(len(table)), chunks)
    taken = np.zeros(len(costs), np.bool_)
    # Plain Python numbers: with up to a million groups, indexing NumPy arrays would dominate the time.
    cost_of, room, left = costs.tolist(), limits.tolist(), budget
    broken_chains: set[int] = set()
    for chunk in np.argsort(scores, kind="stable").tolist():
        cost, chain, layers = cost_of[chunk], chunks.chain[chunk], chunks.layers[chunk]
        if chain in broken_chains:
            continue
        of_each = cost / len(layers)
        if cost > left or any(of_each > room[layer] for layer in layers):
            broken_chains.add(chain)
            continue
        taken[chunk] = True
        left -= cost
        for layer in layers:
            room[layer] -= of_each
    eligible = chunks.of_group >= 0
    return eligible & taken[np.where(eligible, chunks.of_group, 0)]


def _sum_by_chunk(values: NDArray[np.float64] | NDArray[np.int64], chunks: _Chunks) -> NDArray[np.float64]:
    eligible = chunks.of_group >= 0
    sums: NDArray[np.float64] = np.bincount(chunks.of_group[eligible], values[eligible], len(chunks.chain)).astype(
        np.float64
    )
    return sums


def _chunks(table: GroupTable, constraints: Constraints) -> _Chunks:
    if constraints.same_widths:
        return _uniform_chunks(table, constraints)
    of_group = np.full(len(table), -1, np.int64)
    chain: list[int] = []
    layers: list[tuple[int, ...]] = []
    first, last = constraints.freeze_first_n_layers, table.layers - constraints.freeze_last_n_layers
    for block, (key, rows) in enumerate(table.blocks()):
        if not first <= key.layer < last:
            continue
        width = rows.stop - rows.start
        step = _step(key.kind, constraints)
        kept = step if constraints.keeps_attention and key.kind == "attention" else 0
        number = np.arange(width)
        if step > 1 or kept:
            ranks = _ranks(table.score[rows])
            # The first chunk takes the remainder, after which the width is a multiple of `step`.
            number = np.where(ranks < width - kept, (ranks + -width % step) // step, -1)
        of_group[rows] = np.where(number < 0, -1, len(chain) + number)
        count = int(number.max()) + 1
        chain += [block] * count
        layers += [(key.layer,)] * count
    return _Chunks(of_group, chain, layers)


def _uniform_chunks(table: GroupTable, constraints: Constraints) -> _Chunks:
    """Divide groups into chunks of the same ranks in all layers and experts that have their kind.

    Some groups of every block are in no chunk, so that no block is removed.
    """
    of_group = np.full(len(table), -1, np.int64)
    chain: list[int] = []
    of_chunk: list[tuple[int, ...]] = []
    # For channels of experts: the ranks at which their chunks end, and the number of their first chunk.
    of_channels = np.empty(0, np.int64), 0
    for number_of_kind, kind in enumerate(KINDS):
        if layers := table.removed.get(kind.name):
            raise ConfigError(
                f"uniform: an earlier pruning removed the {kind.name} block of {counted(layers, 'layer')} of this "
                "model, so widths differ already; prune the dense model, or leave uniform out"
            )
        of_kind = [(key.layer, rows) for key, rows in table.blocks() if key.kind == kind.name]
        blocks = [part for _, rows in of_kind for part in _parts(rows, table.sets.get(kind.name, 1))]
        widths = sorted({rows.stop - rows.start for rows in blocks})
        if not blocks:
            continue
        if kind.name in table.follows:
            _assign_chunks(table, of_group, blocks, of_channels[0] * table.follows[kind.name], of_channels[1])
            continue
        # Layers that never had this kind of block, such as convolutions among attention layers, do not matter.
        if len(widths) != 1:
            raise ConfigError(
                f"uniform: the layers of this model already differ in their {kind.name} widths: {widths}; only "
                "the dense model can be pruned to equal widths, which uniform and experts require"
            )
        width = widths[0]
        step = math.lcm(_step(kind.name, constraints), 1 if width % kind.multiple else kind.multiple)
        kept = set(range(step, width, step)) & table.plain_widths.get(kind.name, frozenset(range(width)))
        ends = np.array(sorted(width - count for count in kept), np.int64)
        _assign_chunks(table, of_group, blocks, ends, len(chain))
        if kind.name == "expert_channels":
            of_channels = ends, len(chain)
        chain += [number_of_kind] * len(ends)
        of_chunk += [tuple(layer for layer, _ in of_kind)] * len(ends)
    return _Chunks(of_group, chain, of_chunk)


def _assign_chunks(
    table: GroupTable, of_group: NDArray[np.int64], blocks: list[slice], ends: NDArray[np.int64], first: int
) -> None:
    """Assign the groups of each block, by rank, to chunks that end at ranks `ends` and are numbered from `first`."""
    for rows in blocks:
        number = np.searchsorted(ends, _ranks(table.score[rows]), side="right")
        of_group[rows] = np.where(number < len(ends), first + number, -1)


def _parts(rows: slice, count: int) -> list[slice]:
    """Divide consecutive rows into `count` parts of equal size."""
    size = (rows.stop - rows.start) // count
    return [slice(start, start + size) for start in range(rows.start, rows.stop, size)]


def _step(kind: str, constraints: Constraints) -> int:
    """Return the number of groups that a block of this kind must keep a multiple of."""
    return constraints.multiple(rounded=kind in _ROUNDED)


def _ranks(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the position of each score in ascending order; ties keep their order."""
    ranks = np.empty(len(scores), np.int64)
    ranks[np.argsort(scores, kind="stable")] = np.arange(len(scores))
    return ranks


def _limits(table: GroupTable, constraints: Constraints) -> NDArray[np.float64]:
    """Return the number of parameters that each layer may lose under `max_layer_ratio`."""
    of_layer = np.bincount(table.layer, table.cost, table.layers)
    limits: NDArray[np.float64] = constraints.max_layer_ratio * of_layer.astype(np.float64)
    return limits


def _drop_thin_layers(table: GroupTable, pruned: NDArray[np.bool_], epsilon: float) -> None:
    """Mark all groups of a layer as pruned if its blocks keep, on average, less than the fraction `epsilon`."""
    kept: dict[int, list[float]] = {}
    for key, rows in table.blocks():
        kept.setdefault(key.layer, []).append((~pruned[rows]).mean())
    for layer, fractions in kept.items():
        if np.mean(fractions) < epsilon:
            pruned[table.layer == layer] = True
