"""Repair-aware importance: what removing groups costs once least squares has re-solved the weights that stay.

A block with output projection W [O, I] reads x; A = mean over tokens of x x^T, plus a ridge on its diagonal, and g is
the loss's curvature in the block's output. With the columns Q forced to zero, the best that the others can do costs

    cost(Q) = g/2 tr( W_Q (A^-1_QQ)^-1 W_Q^T ),
    W    <- W    - W_Q      (A^-1_QQ)^-1 A^-1_Q:,
    A^-1 <- A^-1 - A^-1_:Q  (A^-1_QQ)^-1 A^-1_Q:,

in the loss's own unit, so that blocks compare (optimal brain surgeon: Hassibi and Stork 1992; for columns of layers:
LLM Surgeon, arXiv:2312.17244; ZipLM, arXiv:2302.04089). Groups are removed one by one, cheapest first, so that of
two identical channels the first costs nothing and the second its full price. g is the mean over samples of the
diagonal mean of sum over tokens dy dy^T, with dy the gradient of the sample's loss to the block's output: one
number per block.

The costs of all groups of a block are multiplied by its reach, see `gradprune.calibration.reach`.

A routed expert is such a block of its own: its tokens are those that are sent to it, and dy the gradient to what it
writes before the router's factor. The channels of one that sees no token cost nothing.
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
"""Added to A's diagonal, relative to its mean: guards against a Gram matrix estimated from few tokens."""

# A round removes at most this share of the block's groups, and at most this many.
_SHARE, _MOST = 1 / 16, 128
# Minimum relative gap between successive costs, so that sorting recovers the path's order even after fp32 rounding.
_STEP = 2.0**-20
# Reach is measured with this share of a block's groups removed. A fifth chose worse on SmolLM2-135M (20 and 50 %) and
# stories260k (30 and 50 %); so did using both shares, one for groups that go early and one for late ones.
_PART = 1 / 2
# Columns that are gone are dropped once what is left is at most this share.
_FULL = 7 / 8
# Then groups are as many as a multiple of this: products of odd widths are split among threads in other places.
_EVEN = 16
# Candidates per round, as a multiple of the groups that it removes.
_SURPLUS = 4


@dataclass(frozen=True)
class RemovalPath:
    """The order in which a block's groups are removed, and each one's cost once those before it are removed.

    order: [groups] int64, the first to go first. cost: [groups] fp64 by position in `order`; their sum up to a position
    is the least-squares optimum's increase of the loss when the groups up to there are gone.
    partial_weight: [O, I], in its dtype, without the first `num_removed` groups and with the others re-solved; half of
        those that write anything are gone, rounded down, or as many more as a round took.
    """

    order: Tensor
    cost: Tensor
    partial_weight: Tensor
    num_removed: int

    @property
    def cost_of_part(self) -> float:
        """What it costs that the first `num_removed` groups are gone."""
        return float(self.cost[: self.num_removed].sum())

    def importance(self) -> Tensor:
        """[groups] fp64 by group: costs that ascend along the path, so that sorting by them gives its order."""
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
    """[groups] fp64 on the CPU for each block of the dense model: importances along its removal path, times its reach.

    Args:
        view: the model, which is run once, layer by layer.
        batches: calibration ids, [N, T] int64 each.
        curvatures: g of each output projection of each block.
        ops: as of `removal_path`.
        ranks: the processes that divide `batches`, which all of them give.
        advance: called after each block.

    The Gram matrices of one layer are in memory at a time, and of its experts one, summed in fp32 (fp64 for fp64
    models).

    Raises:
        NonFiniteError: an input of a block is NaN or infinite; names the layer.
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
    """The dense model's streams, [N, T, H] per batch, which advance layer by layer."""

    view: PrunableModel
    streams: Streams
    curvatures: Mapping[BlockKey, Sequence[float]]
    ops: ImportanceOps | None
    ranks: Ranks
    current: list[Tensor]

    def pass_layer(self, layer: int) -> Iterator[tuple[BlockKey, list[RemovalPath]]]:
        """Run a layer, and give the removal paths of its blocks, in order, one for each output projection."""
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
                yield block.key, [self._of_linear(block, linear.pop(block))]
            elif isinstance(block, ExpertsBlock):
                yield block.key, self._of_experts(block, experts.pop(block))

    def _of_linear(self, block: LinearBlock, gram: GramSum) -> RemovalPath:
        name = f"layer {block.layer}'s {block.output.path}"
        return self._path(gram, block.output.weight, block.output.columns, self.curvatures[block.key][0], name)

    def _of_experts(self, block: ExpertsBlock, seen: Sequence[tuple[Routed, Tensor]]) -> list[RemovalPath]:
        """By channels, of one expert after the other."""
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
        """Of a weight [O, I], see `removal_path`, whose inputs of this rank are summed."""
        tokens: int = sum(self.ranks.gather_json(gram.tokens))
        # Nothing here holds on to the matrices.
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
    """Remove the groups of a block one after the other, each time one of the cheapest.

    A round looks at the cheapest quarter of the block's groups, by the weights and A^-1 as they are at its start (at
    most 512 groups), and removes the cheapest of these one by one, with exact updates among them, until a sixteenth
    of the groups (at most 128) is gone or none of them is cheaper than the cheapest group outside. W and A^-1 are
    updated once at its end. So every cost is exact, and only the order is not always the greedy one; of a block of
    fewer than 32 groups it is.

    Args:
        weight: [O, I] floating point, the output projection.
        gram: [I, I] floating point, positive definite: A, with its ridge, see `with_ridge`.
        columns: of each group; group j has the columns j*columns to (j+1)*columns.
        curvature: g.
        ops: who removes the cheapest groups of a round; by default the fastest that runs on the device of `gram`.
        overwrite: whether `gram` may be, which saves the memory of a copy.

    Computed in fp64 on the device of `gram`; I^2 * (O + I) operations, about 8 I * (2 I + O) bytes. Deterministic; of
    equal costs the lower index goes first.

    Raises:
        ValueError: `gram` is not positive definite.
    """
    ops = ops or select_ops("auto", gram.device.type)
    inverted = inverse(_factor(gram.double(), overwrite=overwrite))
    # Now there are no other references to it, so that it can go as groups do.
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
        # What writes nothing, because an earlier shot took it, goes first and tells nothing.
        silent = costs.count(0.0)
        if not num_removed and len(order) - silent >= int(_PART * (groups - silent)):
            partial_weight, num_removed = block.weight_of_all(weight), len(order)
    cost = 0.5 * curvature * torch.tensor(costs, dtype=torch.float64)
    return RemovalPath(torch.tensor(order), cost, partial_weight, num_removed)


def with_ridge(gram: Tensor, ridge: float = RIDGE) -> Tensor:
    """[I, I] fp64: a Gram matrix with `ridge` times its mean diagonal added; the identity where it is all zero."""
    shifted = gram.to(torch.float64, copy=True)
    unit = shifted.diagonal().mean()
    shifted.diagonal().add_(torch.where(unit > 0.0, ridge * unit, 1.0))
    return shifted


class _Remaining:
    """What is left of a block: `groups`, their weights and A^-1, which are updated as groups are removed.

    To copy a matrix without a few of its columns takes longer than to compute with these. So columns that are gone stay
    where they are, and nothing reads them, until they are an eighth of all.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, columns: int) -> None:
        self.groups = torch.arange(weight.shape[1] // columns)
        self.columns = columns
        # Where the groups are among those of W^T, [I, O], and of A^-1.
        self._at = self.groups
        self._transposed = weight.T.to(inverse.device, torch.float64, memory_format=torch.contiguous_format, copy=True)
        self._inverse = inverse

    def __len__(self) -> int:
        return len(self.groups)

    def costs(self) -> Tensor:
        """[k] tr( W_j (A^-1_jj)^-1 W_j^T ), each group alone."""
        if self.columns == 1:
            squares = torch.linalg.vector_norm(self._transposed, dim=1).square()[:, None, None]
        else:
            columns = self._transposed.unflatten(0, (-1, self.columns))
            squares = columns @ columns.mT
        at = self._at.to(squares.device)
        return costs_alone(diagonal_blocks(self._inverse, self.columns)[at], squares[at])

    def matrices_of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """A^-1 and W^T W of groups at `positions`: a problem of its own, exact as long as only these are removed."""
        at = self._columns_of(self._at[positions])
        weight = self._transposed.index_select(0, at)
        return take_columns(self._inverse.index_select(0, at), at), weight @ weight.T

    def weight_of_all(self, like: Tensor) -> Tensor:
        """The weights as they are now, with zeros for the groups that are gone, of the shape and dtype of `like`."""
        whole = torch.zeros_like(like)
        now = self._transposed.index_select(0, self._columns_of(self._at)).T
        whole[:, self._columns_of(self.groups).to(like.device)] = now.to(like)
        return whole

    def remove(self, positions: Tensor) -> None:
        """Remove groups and update the remaining weights and A^-1 to compensate."""
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
            self._drop_gone()

    def _drop_gone(self) -> None:
        """Copy what is left, without the columns that are gone; some of them fill up its width."""
        gone = torch.ones(len(self._inverse) // self.columns, dtype=torch.bool)
        gone[self._at] = False
        at = self._columns_of(torch.cat((self._at, gone.nonzero().flatten()[: -len(self) % _EVEN])))
        self._transposed = self._transposed.index_select(0, at)
        # One after the other, so that the matrix is there twice at most.
        self._inverse = take_columns(self._inverse, at)
        self._inverse = self._inverse.index_select(0, at)
        self._at = torch.arange(len(self))

    def _columns_of(self, groups: Tensor) -> Tensor:
        at = (groups[:, None] * self.columns + torch.arange(self.columns)).reshape(-1)
        return at.to(self._inverse.device)


def _subtract_product(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """matrix -= left^T right."""
    with same_rounding(matrix):
        matrix.addmm_(left.T, right, alpha=-1.0)


def _round(block: _Remaining, quota: int, ops: ImportanceOps) -> tuple[Tensor, list[float]]:
    """Positions in `block` of the next groups to go, `quota` at most, and the cost of each after those before it."""
    with one_thread():
        costs = block.costs().cpu()
        ranked = costs.argsort(stable=True)
        looked_at = ranked[: _SURPLUS * quota].sort().values
        outside = float(costs[ranked[len(looked_at)]]) if len(looked_at) < len(block) else float("inf")
        inverted, gram = block.matrices_of(looked_at)
        taken, marginal = ops.cheapest_removals(inverted, gram, block.columns, min(quota, len(looked_at)))
    marginal_costs = marginal.tolist()
    # The cheapest group outside goes before those that cost more.
    count = next((n for n, cost in enumerate(marginal_costs) if n and cost > outside), len(marginal_costs))
    return looked_at[taken[:count].cpu()], marginal_costs[:count]


def _factor(matrix: Tensor, *, overwrite: bool = False) -> Tensor:
    factor = cholesky(matrix, overwrite=overwrite)
    if factor is None:
        raise ValueError("gram: it is not positive definite; add a ridge to its diagonal")
    return factor


def _ascending(costs: Tensor) -> Tensor:
    """Costs raised as little as needed to be strictly ascending, even in fp32."""
    least = torch.finfo(torch.float32).tiny
    ascending = []
    last = 0.0
    for cost in costs.tolist():
        last = max(cost, last * (1.0 + _STEP), last + least)
        ascending.append(last)
    return torch.tensor(ascending, dtype=torch.float64)
