"""Repair of the weights that stay: re-solve what each pruned block writes to the residual stream.

For the output projection W [O, I] of a block that keeps the columns K and loses the columns P,

    W'_K = argmin ||W x - W' x_K||^2 + ridge ||W' - W_K||^2 = W_K + W_P G_PK (G_KK + ridge I)^-1,   G = sum x x^T,

summed over calibration tokens, where x is the projection's input in the model as pruned and repaired so far: blocks are
solved in the order the data passes them. ridge is relative to the mean of G_KK's diagonal. No bias is added and no
shape changes. (Least-squares reconstruction of pruned layers: He et al. 2017, arXiv:1707.06168.)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradprune.errors import NonFiniteError
from gradprune.masking import mask_output, masks_by_block
from gradprune.masks import GroupMasks
from gradprune.models import Block, PrunableModel

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Candidates, relative to the mean diagonal; each block takes the one with the least error on held-out samples."""

_MOST_RIDGE = 1e4


@dataclass(frozen=True)
class BlockRepair:
    """What was done to one block: its ridge, and its relative output error on the calibration and held-out tokens.

    error_masked: ||W x - W_K x_K||^2 / ||W x||^2 on the held-out tokens, before. error: the same of W', after.
    """

    kind: str
    layer: int
    ridge: float
    error_masked: float
    error: float


def repair_steps(view: PrunableModel, masks: GroupMasks) -> int:
    """How many blocks `least_squares` looks at."""
    return sum(1 for _ in masks_by_block(view, masks))


@torch.no_grad()
def least_squares(
    model: PreTrainedModel,
    view: PrunableModel,
    masks: GroupMasks,
    samples: Sequence[Tensor],
    held_out: Sequence[Tensor],
    *,
    ridges: Sequence[float] = RIDGES,
    advance: Callable[[], None] = lambda: None,
) -> list[BlockRepair]:
    """Zero the output columns of pruned groups and re-solve the kept ones, in place.

    Args:
        model, view: the model, not cut, and its prunable view.
        masks: what each block keeps. A block that keeps nothing is silenced, one that keeps all is left alone.
        samples: batches of calibration ids, [N, T] int64 each.
        held_out: other batches, on which each block's ridge is chosen from `ridges`; may be empty with one ridge.
        ridges: relative to the mean diagonal of G_KK.
        advance: called after each of `repair_steps` blocks.

    Returns:
        One entry for every block that was re-solved.

    G is accumulated in fp32 (fp64 for fp64 models), one at a time, and factored in fp64; where it does not factor,
    with ten times the ridge. Weights are rounded once, to their own dtype. Deterministic.

    Raises:
        NonFiniteError: an input of a block is NaN or infinite.
    """
    stream = _ResidualStream(model, view, [*samples, *held_out])
    repaired = []
    for layer in range(len(view.layers)):
        for block, kept in masks_by_block(view, masks):
            if block.layer != layer:
                continue
            if kept.any() and not kept.all():
                repaired.append(_repair_block(stream, block, kept, len(samples), ridges))
            else:
                mask_output(block, kept)
            advance()
        stream.pass_layer(layer)
    return repaired


def _repair_block(
    stream: "_ResidualStream", block: Block, kept: Tensor, samples: int, ridges: Sequence[float]
) -> BlockRepair:
    grams = stream.grams(block, samples)
    weight = block.output.linear.weight
    k, p = (block.output.columns_of(g.nonzero().flatten()).to(weight.device) for g in (kept, ~kept))
    solver = _Solver(grams[0], k, p, weight[:, p].double())
    candidates = [(solver.change(ridge), ridge) for ridge in ridges]
    judged = grams[-1]
    errors = [_error(judged, weight, k, p, change) for change, _ in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    nothing = _error(judged, weight, k, p, None)
    change, ridge = candidates[best]
    if errors[best] < nothing:
        weight[:, k] = (weight[:, k].double() + change).to(weight.dtype)
    mask_output(block, kept)
    return BlockRepair(block.kind, block.layer, ridge, nothing, min(errors[best], nothing))


class _Solver:
    """W_P G_PK (G_KK + ridge I)^-1 for several ridges."""

    def __init__(self, gram: Tensor, kept: Tensor, pruned: Tensor, weight: Tensor) -> None:
        gram = gram.double()
        self._kk = gram[kept][:, kept]
        self._right = weight @ gram[pruned][:, kept]
        self._unit = self._kk.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)

    def change(self, ridge: float) -> Tensor:
        """[O, K] fp64."""
        while True:
            shifted = self._kk.clone()
            shifted.diagonal().add_(ridge * self._unit)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if not failed:
                return torch.cholesky_solve(self._right.T, factor).T
            if ridge > _MOST_RIDGE:
                return torch.zeros_like(self._right)
            ridge = max(10.0 * ridge, 1e-10)


def _error(gram: Tensor, weight: Tensor, k: Tensor, p: Tensor, change: Tensor | None) -> float:
    """||W x - W'_K x_K||^2 / ||W x||^2 from the Gram matrix of x; `change` is W'_K - W_K."""
    residual = torch.zeros_like(weight, dtype=torch.float64)
    residual[:, p] = weight[:, p].double()
    if change is not None:
        residual[:, k] = -change
    wide, gram = weight.double(), gram.double()
    whole = ((wide @ gram) * wide).sum()
    return float(((residual @ gram) * residual).sum() / whole) if whole > 0 else 0.0


class _StoppedError(Exception):
    """Ends a forward pass at the point behind which nothing is needed."""


class _ResidualStream:
    """The residual stream of every batch before the layer at hand, in the model as it is up to there."""

    def __init__(self, model: PreTrainedModel, view: PrunableModel, batches: Sequence[Tensor]) -> None:
        self._view = view
        self._hidden: list[Tensor] = []
        # What transformers passes to each layer beside the stream: masks, positions.
        self._arguments: list[list[dict[str, Any]]] = []
        for batch in batches:
            self._record(model, batch.to(model.device))

    def grams(self, block: Block, samples: int) -> list[Tensor]:
        """[I, I]: sums of x x^T of a block's output projection over the first `samples` batches, and over the rest."""
        linear = block.output.linear
        size, dtype = linear.in_features, torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        grams = [torch.zeros(size, size, dtype=dtype, device=linear.weight.device) for _ in range(2)]
        for batch in range(len(self._hidden)):
            x = self._input_of(linear, block.layer, batch).flatten(0, -2).to(dtype)
            grams[batch >= samples].addmm_(x.T, x)
        if not all(gram.diagonal().isfinite().all() for gram in grams):
            raise NonFiniteError(
                f"repair: the input of layer {block.layer}'s {block.output.path} is not finite; "
                "load the model in a wider dtype (bfloat16 or float32)"
            )
        return grams if samples < len(self._hidden) else grams[:1]

    def pass_layer(self, layer: int) -> None:
        """Let every batch through the layer."""
        for batch, hidden in enumerate(self._hidden):
            output = self._view.layers[layer](hidden, **self._arguments[batch][layer])
            self._hidden[batch] = output[0] if isinstance(output, tuple) else output

    def _input_of(self, linear: nn.Linear, layer: int, batch: int) -> Tensor:
        found: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _StoppedError

        handle = linear.register_forward_pre_hook(stop)
        try:
            self._view.layers[layer](self._hidden[batch], **self._arguments[batch][layer])
        except _StoppedError:
            pass
        finally:
            handle.remove()
        return found[0]

    def _record(self, model: PreTrainedModel, ids: Tensor) -> None:
        """One pass that keeps what enters the first layer, and what every layer is given beside the stream."""
        streams: list[Tensor] = []
        arguments: list[dict[str, Any]] = []

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            streams.append(args[0] if args else kwargs.pop("hidden_states"))
            arguments.append(kwargs)

        with _hooks([layer.register_forward_pre_hook(record, with_kwargs=True) for layer in self._view.layers]):
            model.get_decoder()(input_ids=ids, use_cache=False)
        self._hidden.append(streams[0])
        self._arguments.append(arguments)


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
