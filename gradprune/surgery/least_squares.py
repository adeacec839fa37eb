"""Repair of the weights that stay: re-solve what each pruned block writes to the residual stream.

A block with output projection W [O, I] keeps the columns K. With x its input in the model as pruned and repaired so far
(blocks are solved in the order the data passes them), G = sum over calibration tokens of x x^T, and t the target,

    W'_K = argmin sum ||t - W' x_K||^2 + ridge ||W' - W_K||^2 = W_K + (E_K - W_K G_KK) (G_KK + ridge I)^-1,

where E_K = sum t x_K^T. The target blends two: what the whole block would write for this input, and what brings the
residual stream after it to where the dense model has it:

    t = W x + blend ((stream before, dense) - (stream before, pruned) + W x_dense - W x).

blend 0 changes least and suits few samples; a blend above 0 also compensates for the errors of earlier blocks. ridge is
relative to the mean of G_KK's diagonal. No bias is added and no shape changes. (Least-squares reconstruction of a
pruned layer's output: He et al. 2017, arXiv:1707.06168.)
"""

import bisect
import itertools
import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradprune.calibration.cholesky import cholesky, solve
from gradprune.calibration.gram import add_gram, add_product, symmetric
from gradprune.errors import NonFiniteError
from gradprune.models import Block, LinearBlock, PrunableModel
from gradprune.models.masks import GroupMasks
from gradprune.models.streams import Streams
from gradprune.ranks import ALONE, Ranks
from gradprune.surgery.masking import mask_output, masked_outputs, masks_by_block

BLENDS = (0.5,)
"""Candidates; of several, the one with the least loss on held-out samples is kept. Measured on SmolLM2-135M at 20 and
50 %, with the choices of two methods: 0 was never better on held-out text, and 0.06 nats worse at 50 %."""
TRIAL_SAMPLES = 32
"""The blend is chosen on at least this many calibration samples."""
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Ascending candidates, relative to the mean diagonal; each block takes the one with the least error on held-out
samples, found by going down from the middle: in all of 276 cases on SmolLM2-135M the error had a single minimum."""

_MOST_RIDGE = 1e4


@dataclass(frozen=True)
class BlockRepair:
    """What was done to one block.

    error_before, error: ||t - W_K x_K||^2 / ||t||^2 of the weights as they were and as they are, on the held-out
    samples (on the calibration samples where there are none).
    """

    kind: str
    layer: int
    blend: float
    ridge: float
    error_before: float
    error: float


def repair_steps(view: PrunableModel, blends: Sequence[float] = BLENDS) -> int:
    """How many blocks `least_squares` passes: once to choose among `blends`, once to repair."""
    return (1 + (len(blends) > 1)) * len(view.blocks)


@torch.no_grad()
def least_squares(
    view: PrunableModel,
    masks: GroupMasks,
    samples: Sequence[Tensor],
    held_out: Sequence[Tensor],
    *,
    blends: Sequence[float] = BLENDS,
    ridges: Sequence[float] = RIDGES,
    ranks: Ranks = ALONE,
    advance: Callable[[], None] = lambda: None,
) -> list[BlockRepair]:
    """Zero the output columns of pruned groups and re-solve the kept ones, in place.

    Args:
        view: the model, not cut.
        masks: what each block keeps. A block that keeps nothing is silenced, one that keeps all is left alone.
        samples: batches of calibration ids, [N, T] int64 each.
        held_out: other batches, to choose among `blends` and `ridges`; without them, the first blend is taken and
            each ridge is chosen on `samples`.
        blends, ridges: candidates, one at least, ridges ascending. Among several blends, the choice is made on the
            first quarter of `samples`, but on `TRIAL_SAMPLES` at least.
        ranks: the processes that divide `samples` and `held_out`, which all of them give; each solves every block from
            the sums of all.
        advance: called after each of `repair_steps` blocks.

    Returns:
        One entry for every block that was re-solved.

    G and E are accumulated in fp32 (fp64 for fp64 models), those of one block at a time, and solved in fp64; where G
    does not factor, with ten times the ridge. Weights are rounded once, to their own dtype. Deterministic.

    Raises:
        NonFiniteError: an input of a block is NaN or infinite.
    """
    left = iter(range(repair_steps(view, blends)))

    def step() -> None:
        next(left)
        advance()

    pass_layers = partial(_solve_all, view, masks, held_out=held_out, ridges=ridges, ranks=ranks, step=step)
    part = _first_samples(samples)
    if not held_out or len(blends) == 1:
        best = pass_layers(samples, blends=blends[:1])[0]
    else:
        tried = pass_layers(part, blends=blends)
        # On ties, the first.
        best = min(tried, key=lambda path: math.inf if math.isnan(path.loss) else path.loss)
        if len(part) < len(samples):
            best = pass_layers(samples, blends=(best.blend,))[0]
    for _ in left:
        advance()
    for block, kept in masks_by_block(view, masks):
        if kept.all():
            continue
        with view.rewriting(block):
            if isinstance(block, LinearBlock) and block.output.linear in best.solved:
                block.output.linear.weight.copy_(best.solved[block.output.linear])
            mask_output(block, kept)
    return best.repairs


def _first_samples(samples: Sequence[Tensor]) -> Sequence[Tensor]:
    """The first batches, enough to choose a blend on."""
    needed = max(TRIAL_SAMPLES, sum(map(len, samples)) // 4)
    ends = list(itertools.accumulate(map(len, samples)))
    return samples[: 1 + bisect.bisect_left(ends, needed)]


@dataclass
class _Path:
    """The model pruned and repaired so far with one blend.

    streams: per batch, [N, T, H] before the current layer. solved: weights [O, I] that are not the model's own.
    loss: on the held-out samples, once all layers are passed.
    """

    blend: float
    streams: list[Tensor]
    solved: MutableMapping[nn.Linear, Tensor]
    repairs: list[BlockRepair] = field(default_factory=list)
    loss: float = 0.0


def _solve_all(
    view: PrunableModel,
    masks: GroupMasks,
    samples: Sequence[Tensor],
    *,
    held_out: Sequence[Tensor],
    blends: Sequence[float],
    ridges: Sequence[float],
    ranks: Ranks,
    step: Callable[[], None],
) -> list[_Path]:
    """One path per blend; all advance layer by layer together and share the dense model's stream."""
    own = ranks.share(samples)
    streams = Streams(view, [*own, *ranks.share(held_out)])
    parts = [slice(len(own)), slice(len(own), None)] if held_out else [slice(None)]
    paths = [_Path(blend, list(streams.first), view.shelf()) for blend in blends]
    dense = _Dense(streams) if any(blends) else None
    for layer in range(len(view.layers)):
        blocks = [(block, masks[block]) for block in view.of_layer(layer)]
        with view.resident(layer, layer + 1):
            if dense is not None:
                dense.pass_layer(layer)
            for path in paths:
                _pass_layer(streams, layer, blocks, path, dense, parts, ridges, ranks)
        for _ in blocks:
            step()
    if held_out and len(paths) > 1:
        for path in paths:
            path.loss = streams.mean_loss(path.streams, len(own), ranks)
    return paths


class _Dense:
    """The dense model's stream: before the current layer, after it, and what its blocks write, per batch."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.before: list[Tensor] = []
        self.after = streams.first
        self.written: list[dict[nn.Module, Tensor]] = []

    def pass_layer(self, layer: int) -> None:
        """Advance by one layer."""
        self.before = self.after
        passed = [self._streams.layer_and_written(layer, batch, stream) for batch, stream in enumerate(self.before)]
        self.after, self.written = [after for after, _ in passed], [written for _, written in passed]


def _pass_layer(
    streams: Streams,
    layer: int,
    blocks: Sequence[tuple[Block, Tensor]],
    path: _Path,
    dense: _Dense | None,
    parts: Sequence[slice],
    ridges: Sequence[float],
    ranks: Ranks,
) -> None:
    """Solve a layer's blocks in order of execution, and pass the path's stream through them.

    parts: the batches that blocks are solved on, and those that choose the ridge.
    """
    # Dense stream minus the path's stream; and per batch, the outputs of the layer's blocks so far.
    ahead = None if dense is None else [d - p for d, p in zip(dense.before, path.streams, strict=True)]
    written: list[dict[nn.Module, Tensor]] = [{} for _ in path.streams]
    for block, kept in blocks:
        if not isinstance(block, LinearBlock):
            # An expert sees too few tokens to solve for its weights: it is masked.
            writes = masked_outputs(streams, block, kept, path.streams, written)
            _advance(block, writes, written, dense, ahead)
            continue
        if kept.any():
            inputs = [
                streams.output_input(block, batch, stream, written[batch]) for batch, stream in enumerate(path.streams)
            ]
        if kept.any() and not kept.all():
            wanted = None
            if ahead is not None and path.blend:
                assert dense is not None
                wanted = [_wanted(block, lead, write) for lead, write in zip(ahead, dense.written, strict=True)]
            moments = [_moments(block, inputs[part], None if wanted is None else wanted[part], ranks) for part in parts]
            path.solved[block.output.linear], repair = _solve_block(block, kept, moments, path.blend, ridges)
            path.repairs.append(repair)
        writes = [
            _write(block, inputs[batch], path.solved).to(streams.home) if kept.any() else torch.zeros_like(stream)
            for batch, stream in enumerate(path.streams)
        ]
        _advance(block, writes, written, dense, ahead)
    path.streams = [streams.layer(layer, batch, stream, written[batch]) for batch, stream in enumerate(path.streams)]


def _advance(
    block: Block,
    writes: Sequence[Tensor],
    written: Sequence[dict[nn.Module, Tensor]],
    dense: _Dense | None,
    ahead: list[Tensor] | None,
) -> None:
    """Note what the block writes per batch, and by how much the dense stream leads after it."""
    for batch, write in enumerate(writes):
        written[batch][block.module] = write
        if ahead is not None:
            assert dense is not None
            missing = dense.written[batch][block.module] - write
            ahead[batch] = ahead[batch] + (block.adds or 0.0) * missing.view_as(ahead[batch])


def _wanted(block: Block, ahead: Tensor, written: dict[nn.Module, Tensor]) -> Tensor:
    """[N, T, O] what a block would have to write to bring the stream, which lags by `ahead`, to the dense one.

    Behind a norm no multiple of it is added to the stream: there it is what the dense block writes before the norm.
    """
    own = written[block.module]
    return own if block.adds is None else ahead / block.adds + own


def _write(block: LinearBlock, x: Tensor, solved: MutableMapping[nn.Linear, Tensor]) -> Tensor:
    linear = block.output.linear
    return F.linear(x.to(linear.weight.device), solved.get(linear, linear.weight), linear.bias)


def _solve_block(
    block: LinearBlock, kept: Tensor, moments: Sequence["_Moments"], blend: float, ridges: Sequence[float]
) -> tuple[Tensor, BlockRepair]:
    """The weight [O, I] with zeros in the pruned columns; solved on the first moments, evaluated on the last."""
    weight = block.output.linear.weight
    columns = block.output.columns_of(kept.nonzero().flatten()).to(weight.device)
    before = weight[:, columns].double()
    fitted, judge = (each.kept(weight, columns, blend) for each in (moments[0], moments[-1]))

    def attempt(ridge: float) -> _Attempt:
        found = _solve(fitted, before, ridge)
        return _Attempt(judge.error(found), ridge, found)

    best = _best_ridge(ridges, attempt)
    unrepaired = judge.error(before)
    solved = torch.zeros_like(weight)
    solved[:, columns] = (best.weight if best.error < unrepaired else before).to(weight.dtype)
    return solved, BlockRepair(block.kind.name, block.layer, blend, best.ridge, unrepaired, min(best.error, unrepaired))


@dataclass(frozen=True)
class _Attempt:
    """A ridge, the weight [O, K] fp64 that it gives, and that weight's error."""

    error: float
    ridge: float
    weight: Tensor


def _best_ridge(ridges: Sequence[float], attempt: Callable[[float], _Attempt]) -> _Attempt:
    """The first minimum of the error when going from the middle of `ridges` to where it falls."""
    middle = len(ridges) // 2
    best = attempt(ridges[middle])
    for direction in (reversed(ridges[:middle]), ridges[middle + 1 :]):
        start = best
        for ridge in direction:
            found = attempt(ridge)
            if not found.error < best.error:
                break
            best = found
        if best is not start:
            break
    return best


@dataclass(frozen=True)
class _Moments:
    """Sums over tokens, with z the block output that would make the stream equal to the dense one.

    gram: [I, I], x x^T. cross: [O, I], z x^T. square: [], ||z||^2. The last two are zero if no blend needs them.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor

    def kept(self, weight: Tensor, columns: Tensor, blend: float) -> "_KeptMoments":
        """The moments needed to solve for the kept columns, for the target t = W x + blend (z - W x)."""
        weight, gram, cross = weight.double(), self.gram.double(), self.cross.double()
        own = weight @ gram
        target = torch.lerp(own, cross, blend)
        square = (
            (1.0 - blend) ** 2 * _dot(own, weight)
            + 2.0 * blend * (1.0 - blend) * _dot(cross, weight)
            + blend**2 * self.square.double()
        )
        return _KeptMoments(gram[columns[:, None], columns], target[:, columns], square, self.gram.dtype)


@dataclass(frozen=True)
class _KeptMoments:
    """Sums over tokens: gram x_K x_K^T [K, K], cross t x_K^T [O, K], square ||t||^2 [], all fp64.

    measured: the dtype they were summed in, which is precise enough for the error.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    measured: torch.dtype

    def error(self, weight: Tensor) -> float:
        """sum ||t - weight x_K||^2 / sum ||t||^2, weight: [O, K] fp64."""
        if self.square <= 0.0:
            return 0.0
        written = (weight.to(self.measured) @ self.gram.to(self.measured)).double()
        rest = self.square - 2.0 * _dot(weight, self.cross) + _dot(written, weight)
        return float(rest / self.square)


def _moments(block: LinearBlock, inputs: Sequence[Tensor], wanted: Sequence[Tensor] | None, ranks: Ranks) -> _Moments:
    """Of a block's inputs x [N, T, I] on all ranks, and of the outputs [N, T, O] that make the stream the dense one.

    Raises:
        NonFiniteError: an input is NaN or infinite.
    """
    linear = block.output.linear
    dtype = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
    outputs, width = linear.weight.shape
    gram, cross, square = (
        torch.zeros(size, dtype=dtype, device=linear.weight.device) for size in ((width, width), (outputs, width), ())
    )
    for batch, x in enumerate(inputs):
        rows = x.to(gram.device).flatten(0, -2)
        add_gram(gram, rows)
        if wanted is not None:
            z = wanted[batch].to(gram.device)
            z = (z if linear.bias is None else z - linear.bias).flatten(0, -2)
            add_product(cross, z, rows)
            square += _dot(z.to(dtype), z.to(dtype))
    gram = ranks.sum(gram)
    if wanted is not None:
        cross, square = ranks.sum(cross), ranks.sum(square)
    if not (gram.diagonal().isfinite().all() and square.isfinite()):
        raise NonFiniteError(
            f"repair: the input of layer {block.layer}'s {block.output.path} is not finite; "
            "load the model in a wider dtype (bfloat16 or float32)"
        )
    return _Moments(symmetric(gram), cross, square)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """[] the sum of products, to the same bits at any number of threads: no sum is split between threads."""
    return (left * right).sum(0).sum()


def _solve(moments: _KeptMoments, before: Tensor, ridge: float) -> Tensor:
    """[O, K] fp64: W'_K from W_K = before."""
    unit = moments.gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    right = moments.cross - before @ moments.gram
    while True:
        shifted = moments.gram.clone()
        shifted.diagonal().add_(ridge * unit)
        factor = cholesky(shifted)
        if factor is not None:
            return before + solve(factor, right.T).T
        if ridge > _MOST_RIDGE:
            return before
        ridge = max(10.0 * ridge, 1e-10)
