"""Repair-aware importance `obs`: what removing groups costs once least squares has re-solved the remaining weights.

A block's output projection W [O, I] reads x; A = mean over tokens of x x^T, plus a ridge on its diagonal, and g is the
loss's curvature with respect to the block's output. If the columns Q are forced to zero and the other columns are
re-solved optimally, the cost and the updates are

    cost(Q) = g/2 tr( W_Q (A^-1_QQ)^-1 W_Q^T ),
    W    <- W    - W_Q      (A^-1_QQ)^-1 A^-1_Q:,
    A^-1 <- A^-1 - A^-1_:Q  (A^-1_QQ)^-1 A^-1_Q:,

in the unit of the loss, so that blocks are comparable (optimal brain surgeon: Hassibi and Stork 1992; for columns of
layers: LLM Surgeon, arXiv:2312.17244; ZipLM, arXiv:2302.04089). Groups are removed one by one, cheapest first, so that
of two identical channels the first costs nothing and the second its full price. g is the mean over samples of the
diagonal mean of sum over tokens dy dy^T, with dy the gradient of the sample's loss with respect to the block's output:
one number per block.

The costs of all groups of a block are multiplied by the block's reach, see `gradprune.calibration.reach`.

Each routed expert is treated as a block of its own: its tokens are those routed to it, and dy is the gradient with
respect to its output before this is multiplied by the router's factor. If no token is routed to an expert, its channels
cost nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradprune.calibration.cholesky import cholesky, inverse
from gradprune.calibration.gram import GramSum, same_rounding
from gradprune.calibration.reach import Followed, reaches
from gradprune.models import BlockKey, LinearBlock, PrunableModel
from gradprune.models.blocks import take_columns
from gradprune.models.experts import ExpertsBlock, Routed
from gradprune.models.footprint import OBS_STREAMS
from gradprune.models.modes import evaluation_mode, one_thread
from gradprune.models.streams import Streams, drained, read_bytes, stream_bytes
from gradprune.ops.dispatch import ImportanceOps, select_ops
from gradprune.ops.removals import costs_alone, diagonal_blocks
from gradprune.ranks import ALONE, Ranks

RIDGE = 0.01
"""The ridge relative to the mean of A's diagonal; it guards against a Gram matrix estimated from few tokens."""

# A round removes at most this share of the block's groups, and never more than this number.
_SHARE, _MOST = 1 / 16, 128
# Minimum relative gap between successive costs, so that sorting recovers the path's order even after fp32 rounding.
_STEP = 2.0**-20
# Reach is measured with this share of a block's groups removed. With a fifth, worse groups were chosen on SmolLM2-135M
# (20 and 50 %) and stories260k (30 and 50 %); so they were with both shares, one for the groups removed early and one
# for those removed late.
_PART = 1 / 2
# The matrices are compacted, without removed columns, once the remaining columns are at most this share of their width.
_FULL = 7 / 8
# The number of groups in compacted matrices is a multiple of this, because threads split products of odd widths at
# other places.
_EVEN = 16
# Candidates per round, as a multiple of the number of groups that the round removes at most.
_SURPLUS = 4


@dataclass(frozen=True)
class RemovalPath:
    """The order in which a block's groups are removed, and what each removal costs after the ones before it.

    order: [groups] int64, the groups in the order of their removal.
    cost: [groups] fp64, by position in `order`. The sum up to a position is the increase of the loss when the groups up
        to there are removed and least squares has re-solved the others.
    partial_weight: [O, I], in the weight's dtype, with the first `num_removed` groups removed and the others re-solved.
    num_removed: after the first round by which half of the groups that write anything, rounded down, are removed, the
        number of all groups removed.
    """

    order: Tensor
    cost: Tensor
    partial_weight: Tensor
    num_removed: int

    @property
    def cost_of_part(self) -> float:
        """The cost of removing the first `num_removed` groups."""
        return float(self.cost[: self.num_removed].sum())

    def importance(self) -> Tensor:
        """[groups] fp64, by group: costs made strictly ascending along the path, so that sorting gives its order."""
        ascending = torch.empty_like(self.cost)
        ascending[self.order] = _ascending(self.cost)
        return ascending


@torch.no_grad()
def removal_costs(
    view: PrunableModel,
    batches: Sequence[Tensor],
    curvatures: Mapping[BlockKey, Sequence[float]],
    ops: ImportanceOps | None = None,
    ranks: Ranks = ALONE,
    advance: Callable[[], None] = lambda: None,
) -> dict[BlockKey, Tensor]:
    """Each block's importances by `obs`, [groups] fp64 on the CPU: costs along its removal path, times its reach.

    Args:
        view: the dense model, which is run once, layer by layer.
        batches: [N, T] int64 each, the calibration samples; every rank is given all of them.
        curvatures: for each block, g of each of its output projections.
        ops: see `removal_path`.
        ranks: the processes that divide `batches` among themselves.
        advance: called after each block.

    Only the Gram matrices of one layer are in memory at a time, and of its experts' only one; they are summed in fp32
    (fp64 for fp64 models).

    Raises:
        NonFiniteError: an input of an output projection is NaN or infinite; names the layer.
    """
    with evaluation_mode(view.model):
        own = ranks.share(batches)
        of_experts = read_bytes(view, own) if view.has_experts else 0
        streams = Streams(view, own, OBS_STREAMS * stream_bytes(view, own) + of_experts)
        state = _Pass(view, streams, curvatures, ops, ranks, streams.take_first())
        followed = Followed(view, batches, ranks)
        importances: dict[BlockKey, Tensor] = {}
        costs: dict[BlockKey, tuple[float, float]] = {}
        for layer in range(len(view.layers)):
            with view.resident(layer, layer + 1):
                partial_weights = {}
                for key, paths in state.pass_layer(layer):
                    importances[key] = torch.cat([path.importance() for path in paths])
                    costs[key] = sum(path.cost_of_part for path in paths), sum(path.cost.sum().item() for path in paths)
                    partial_weights[key] = [path.partial_weight for path in paths]
                    advance()
                followed.pass_layer(layer, partial_weights)
        reach = reaches(followed.divergences(), costs)
    return {key: reach[key] * importance for key, importance in importances.items()}


@dataclass
class _Pass:
    """A pass of this rank's batches through the dense model, layer by layer; current: their streams, [N, T, H] each."""

    view: PrunableModel
    streams: Streams
    curvatures: Mapping[BlockKey, Sequence[float]]
    ops: ImportanceOps | None
    ranks: Ranks
    current: list[Tensor]

    def pass_layer(self, layer: int) -> Iterator[tuple[BlockKey, list[RemovalPath]]]:
        """Run a layer, and yield for each of its blocks, in order, the removal paths of its output projections."""
        linear: dict[LinearBlock, GramSum] = {}
        experts: dict[ExpertsBlock, list[tuple[Routed, Tensor]]] = {}
        for block in self.view.of_layer(layer):
            if isinstance(block, LinearBlock):
                linear[block] = GramSum(block.output.weight)
            elif isinstance(block, ExpertsBlock):
                experts[block] = []
        shown = {block: gram.add for block, gram in linear.items()}, {b: seen.append for b, seen in experts.items()}
        self.current = [
            self.streams.layer_and_reads(layer, batch, stream, *shown)
            for batch, stream in enumerate(drained(self.current))
        ]
        del shown
        for block in self.view.of_layer(layer):
            if isinstance(block, LinearBlock):
                yield block.key, [self._linear_path(block, linear.pop(block))]
            elif isinstance(block, ExpertsBlock):
                yield block.key, self._expert_paths(block, experts.pop(block))

    def _linear_path(self, block: LinearBlock, gram: GramSum) -> RemovalPath:
        name = f"layer {block.layer}'s {block.output.path}"
        return self._path(gram, block.output.weight, block.output.columns, self.curvatures[block.key][0], name)

    def _expert_paths(self, block: ExpertsBlock, seen: Sequence[tuple[Routed, Tensor]]) -> list[RemovalPath]:
        """The removal path of each expert, whose groups are always its channels."""
        paths = []
        for expert, curvature in enumerate(self.curvatures[block.key]):
            weight = block.down.weight(expert)
            gram = GramSum(weight)
            for routed, inputs in seen:
                gram.add(inputs[routed.spans[expert]])
            name = f"layer {block.layer}'s {block.down.name} of expert {expert}"
            paths.append(self._path(gram, weight, 1, curvature, name))
        return paths

    def _path(self, gram: GramSum, weight: Tensor, columns: int, curvature: float, name: str) -> RemovalPath:
        """The removal path of a weight [O, I]; gram: the sum over this rank's inputs of the weight."""
        tokens: int = sum(self.ranks.gather_json(gram.tokens))
        # No variable here keeps a reference to the matrices, so that `removal_path` can free them.
        return removal_path(
            weight,
            with_ridge(gram.total(self.ranks, "obs", name).div_(max(tokens, 1))),
            columns,
            curvature,
            ops=self.ops,
            overwrite=True,
        )


def removal_path(
    weight: Tensor,
    gram: Tensor,
    columns: int,
    curvature: float = 1.0,
    *,
    ops: ImportanceOps | None = None,
    overwrite: bool = False,
) -> RemovalPath:
    """Remove the groups of a block one by one, each time one of the cheapest.

    The candidates of a round are the cheapest quarter of the block's groups (at most 512), by W and A^-1 at its start.
    The round removes the cheapest candidates one by one, with exact updates among the candidates, until a sixteenth of
    the block's groups (at most 128) are removed or the next candidate costs more than the cheapest group that is not a
    candidate. W and A^-1 are updated once at its end. So every cost is exact; only the order is not always the greedy
    one. In a block of fewer than 32 groups it always is.

    Args:
        weight: [O, I] floating point, the output projection.
        gram: [I, I] floating point, positive definite: A, with its ridge, see `with_ridge`.
        columns: the number of columns of each group; group j has the columns j*columns to (j+1)*columns.
        curvature: g.
        ops: the implementation that removes the cheapest candidates; None: the fastest that runs on `gram`'s device.
        overwrite: whether `gram` may be overwritten, which saves the memory of a copy.

    Computed in fp64 on the device of `gram`, in I^2 * (O + I) operations and about 8 I * (2 I + O) bytes.
    Deterministic; ties are broken by the lower index.

    Raises:
        ValueError: `gram` is not positive definite.
    """
    ops = ops or select_ops("auto", gram.device.type)
    inverted = inverse(_factor(gram.double(), overwrite=overwrite))
    # Drop the references here, so that the matrix is freed when `_Remaining` replaces it by a smaller one.
    del gram
    block = _Remaining(weight.detach(), inverted, columns)
    del inverted
    quota = min(max(1, int(_SHARE * len(block))), _MOST)
    order: list[int] = []
    costs: list[float] = []
    groups, partial_weight, num_removed = len(block), weight, 0
    while len(block):
        taken, marginal = _round(block, quota, ops)
        order += block.groups[taken].tolist()
        costs += marginal
        block.remove(taken)
        # Groups that write nothing, because an earlier shot masked them, are removed first and do not count here.
        silent = costs.count(0.0)
        if not num_removed and len(order) - silent >= int(_PART * (groups - silent)):
            partial_weight, num_removed = block.weight_of_all(weight), len(order)
    cost = 0.5 * curvature * torch.tensor(costs, dtype=torch.float64)
    return RemovalPath(torch.tensor(order), cost, partial_weight, num_removed)


def with_ridge(gram: Tensor, ridge: float = RIDGE) -> Tensor:
    """[I, I] fp64: `gram` plus `ridge` times its mean diagonal on the diagonal; the identity if `gram` is zero."""
    shifted = gram.to(torch.float64, copy=True)
    unit = shifted.diagonal().mean()
    shifted.diagonal().add_(torch.where(unit > 0.0, ridge * unit, 1.0))
    return shifted


class _Remaining:
    """The remaining groups of a block with their weights and A^-1, which are updated as groups are removed.

    groups: [k] int64, the remaining groups, ascending.

    Copying a matrix without a few of its columns takes longer than computing with all of them. So removed columns stay
    in the matrices, unread, until they are an eighth of all columns.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, columns: int) -> None:
        self.groups = torch.arange(weight.shape[1] // columns)
        self.columns = columns
        # The positions of the remaining groups among the groups that W^T, [I, O], and A^-1 still hold.
        self._at = self.groups
        self._transposed = weight.T.to(inverse.device, torch.float64, memory_format=torch.contiguous_format, copy=True)
        self._inverse = inverse

    def __len__(self) -> int:
        return len(self.groups)

    def costs(self) -> Tensor:
        """[k]: tr( W_j (A^-1_jj)^-1 W_j^T ) of each remaining group j, the cost of removing it alone (without g/2)."""
        if self.columns == 1:
            squares = torch.linalg.vector_norm(self._transposed, dim=1).square()[:, None, None]
        else:
            columns = self._transposed.unflatten(0, (-1, self.columns))
            squares = columns @ columns.mT
        at = self._at.to(squares.device)
        return costs_alone(diagonal_blocks(self._inverse, self.columns)[at], squares[at])

    def matrices_of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """A^-1 and W^T W of the groups at `positions`, which suffice, exactly, as long as only these are removed."""
        at = self._columns_of(self._at[positions])
        weight = self._transposed.index_select(0, at)
        return take_columns(self._inverse.index_select(0, at), at), weight @ weight.T

    def weight_of_all(self, like: Tensor) -> Tensor:
        """The current weights, with zeros for removed groups, in the shape and dtype of `like`."""
        whole = torch.zeros_like(like)
        now = self._transposed.index_select(0, self._columns_of(self._at)).T
        whole[:, self._columns_of(self.groups).to(like.device)] = now.to(like)
        return whole

    def remove(self, positions: Tensor) -> None:
        """Remove the groups at `positions`, and update the remaining weights and A^-1 to compensate."""
        out = self._columns_of(self._at[positions])
        rows = self._inverse.index_select(0, out)
        factor = _factor(take_columns(rows, out))
        with one_thread():
            across = torch.linalg.solve_triangular(factor, rows, upper=False)
            gone = torch.linalg.solve_triangular(factor, self._transposed.index_select(0, out), upper=False)
        _subtract_product(self._transposed, across, gone)
        _subtract_product(self._inverse, across, across)
        stay = torch.ones(len(self), dtype=torch.bool)
        stay[positions] = False
        self.groups, self._at = self.groups[stay], self._at[stay]
        if len(self) * self.columns <= _FULL * len(self._inverse):
            self._compact()

    def _compact(self) -> None:
        """Copy the matrices without removed columns, except as many as pad them to a multiple of `_EVEN` groups."""
        gone = torch.ones(len(self._inverse) // self.columns, dtype=torch.bool)
        gone[self._at] = False
        at = self._columns_of(torch.cat((self._at, gone.nonzero().flatten()[: -len(self) % _EVEN])))
        self._transposed = self._transposed.index_select(0, at)
        # Two separate steps, so that no more than two copies of the matrix exist at a time.
        self._inverse = take_columns(self._inverse, at)
        self._inverse = self._inverse.index_select(0, at)
        self._at = torch.arange(len(self))

    def _columns_of(self, groups: Tensor) -> Tensor:
        at = (groups[:, None] * self.columns + torch.arange(self.columns)).reshape(-1)
        return at.to(self._inverse.device)


def _subtract_product(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """Subtract left^T right from `matrix` in place."""
    with same_rounding(matrix):
        matrix.addmm_(left.T, right, alpha=-1.0)


def _round(block: _Remaining, quota: int, ops: ImportanceOps) -> tuple[Tensor, list[float]]:
    """The positions in `block` of the next groups to remove, at most `quota`, and the cost of each removal in turn."""
    with one_thread():
        costs = block.costs().cpu()
        ranked = costs.argsort(stable=True)
        candidates = ranked[: _SURPLUS * quota].sort().values
        outside = float(costs[ranked[len(candidates)]]) if len(candidates) < len(block) else float("inf")
        inverted, gram = block.matrices_of(candidates)
        taken, marginal = ops.cheapest_removals(inverted, gram, block.columns, min(quota, len(candidates)))
    marginal_costs = marginal.tolist()
    # Stop before a candidate that costs more than the cheapest group outside, which should be removed before it.
    count = next((n for n, cost in enumerate(marginal_costs) if n and cost > outside), len(marginal_costs))
    return candidates[taken[:count].cpu()], marginal_costs[:count]


def _factor(matrix: Tensor, *, overwrite: bool = False) -> Tensor:
    factor = cholesky(matrix, overwrite=overwrite)
    if factor is None:
        raise ValueError("gram: it is not positive definite; add a ridge to its diagonal")
    return factor


def _ascending(costs: Tensor) -> Tensor:
    """The costs, raised as little as needed to be strictly ascending even in fp32."""
    least = torch.finfo(torch.float32).tiny
    ascending = []
    last = 0.0
    for cost in costs.tolist():
        last = max(cost, last * (1.0 + _STEP), last + least)
        ascending.append(last)
    return torch.tensor(ascending, dtype=torch.float64)
