"""Repair of the weights that stay: re-solve what each pruned block writes to the residual stream.

A block with output projection W [O, I] keeps the columns K. With x its input in the model as pruned and repaired so far
(blocks are solved in the order the data passes them), G = sum over calibration tokens of x x^T, and t the target,

    W'_K = argmin sum ||t - W' x_K||^2 + ridge ||W' - W_K||^2 = W_K + (E_K - W_K G_KK) (G_KK + ridge I)^-1,

where E_K = sum t x_K^T. The target blends two: what the whole block would write for this input, and what brings the
residual stream behind it to where the dense model has it:

    t = W x + blend ((stream before, dense) - (stream before, pruned) + W x_dense - W x).

blend 0 changes least and suits few samples; a blend above 0 also takes back what earlier blocks lost. ridge is relative
to the mean of G_KK's diagonal. No bias is added and no shape changes. (Least-squares reconstruction of a pruned layer's
output: He et al. 2017, arXiv:1707.06168.)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.errors import NonFiniteError
from gradprune.models import Block, BlockKey, PrunableModel
from gradprune.models.loss import mean_loss
from gradprune.models.masks import GroupMasks
from gradprune.surgery.masking import mask_output, masks_by_block, output_weights_restored

BLENDS = (0.0, 0.5)
"""Tried in turn; the one with the least loss on held-out samples is kept."""
RIDGES = (0.01, 0.1, 1.0)
"""Candidates, relative to the mean diagonal; each block takes the one with the least error on held-out samples."""

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
    """How many blocks `least_squares` passes."""
    return len(blends) * len(view.blocks)


@torch.no_grad()
def least_squares(
    view: PrunableModel,
    masks: GroupMasks,
    samples: Sequence[Tensor],
    held_out: Sequence[Tensor],
    *,
    blends: Sequence[float] = BLENDS,
    ridges: Sequence[float] = RIDGES,
    advance: Callable[[], None] = lambda: None,
) -> list[BlockRepair]:
    """Zero the output columns of pruned groups and re-solve the kept ones, in place.

    Args:
        view: the model, not cut.
        masks: what each block keeps. A block that keeps nothing is silenced, one that keeps all is left alone.
        samples: batches of calibration ids, [N, T] int64 each.
        held_out: other batches, to choose among `blends` and `ridges`; without them, the first blend is taken and
            each ridge is chosen on `samples`.
        blends, ridges: candidates, one at least.
        advance: called after each of `repair_steps` blocks.

    Returns:
        One entry for every block that was re-solved.

    G and E are accumulated in fp32 (fp64 for fp64 models), those of one block at a time, and solved in fp64; where G
    does not factor, with ten times the ridge. Weights are rounded once, to their own dtype. Deterministic.

    Raises:
        NonFiniteError: an input of a block is NaN or infinite.
    """
    best: tuple[float, list[BlockRepair], list[Tensor]] | None = None
    for blend in blends if held_out else blends[:1]:
        with output_weights_restored(view, masks):
            repairs = _solve_all(view, masks, [*samples, *held_out], len(samples), blend, ridges, advance)
            loss = mean_loss(view.model, held_out) if held_out else 0.0
            if best is None or loss < best[0]:
                best = (loss, repairs, [parameter.clone() for parameter in _output_parameters(view, masks)])
    assert best is not None
    for parameter, solved in zip(_output_parameters(view, masks), best[2], strict=True):
        parameter.copy_(solved)
    return best[1]


def _output_parameters(view: PrunableModel, masks: GroupMasks) -> list[nn.Parameter]:
    """Those that repairing changes."""
    pruned = [block for block, kept in masks_by_block(view, masks) if not kept.all()]
    return [parameter for block in pruned for parameter in block.output.linear.parameters()]


def _solve_all(
    view: PrunableModel,
    masks: GroupMasks,
    batches: Sequence[Tensor],
    samples: int,
    blend: float,
    ridges: Sequence[float],
    advance: Callable[[], None],
) -> list[BlockRepair]:
    streams = _Streams(view, batches)
    repairs = []
    of_layer: dict[int, list[tuple[Block, Tensor]]] = {}
    for block, kept in masks_by_block(view, masks):
        of_layer.setdefault(block.layer, []).append((block, kept))
    for layer in range(len(view.layers)):
        streams.pass_dense(layer)
        for block, kept in of_layer.get(layer, []):
            if kept.any() and not kept.all():
                repairs.append(_solve_block(streams, block, kept, samples, blend, ridges))
            else:
                mask_output(block, kept)
            advance()
        streams.pass_pruned(layer)
    return repairs


def _solve_block(
    streams: "_Streams", block: Block, kept: Tensor, samples: int, blend: float, ridges: Sequence[float]
) -> BlockRepair:
    weight = block.output.linear.weight
    columns = block.output.columns_of(kept.nonzero().flatten()).to(weight.device)
    moments = streams.moments(block, columns, samples, blend)
    before = weight[:, columns].double()
    candidates = [(_solve(moments[0], before, ridge), ridge) for ridge in ridges]
    judge = moments[-1]
    errors = [judge.error(solved) for solved, _ in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    unrepaired = judge.error(before)
    if errors[best] < unrepaired:
        weight[:, columns] = candidates[best][0].to(weight.dtype)
    mask_output(block, kept)
    return BlockRepair(
        block.kind.name, block.layer, blend, candidates[best][1], unrepaired, min(errors[best], unrepaired)
    )


@dataclass(frozen=True)
class _Moments:
    """Sums over tokens: gram x_K x_K^T [K, K], cross t x_K^T [O, K], square ||t||^2 [], all fp64."""

    gram: Tensor
    cross: Tensor
    square: Tensor

    def error(self, weight: Tensor) -> float:
        """sum ||t - weight x_K||^2 / sum ||t||^2, weight: [O, K] fp64."""
        if self.square <= 0.0:
            return 0.0
        rest = self.square - 2.0 * (weight * self.cross).sum() + ((weight @ self.gram) * weight).sum()
        return float(rest / self.square)


def _solve(moments: _Moments, before: Tensor, ridge: float) -> Tensor:
    """[O, K] fp64: W'_K from W_K = before."""
    unit = moments.gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    right = moments.cross - before @ moments.gram
    while True:
        shifted = moments.gram.clone()
        shifted.diagonal().add_(ridge * unit)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return before + torch.cholesky_solve(right.T, factor).T
        if ridge > _MOST_RIDGE:
            return before
        ridge = max(10.0 * ridge, 1e-10)


class _StoppedError(Exception):
    """Ends a forward pass at the point behind which nothing is needed."""


class _Streams:
    """The residual stream of every batch before the layer at hand: in the dense model, and in the one pruned so far.

    Both run through the same modules: the dense stream passes a layer before it is changed.
    """

    def __init__(self, view: PrunableModel, batches: Sequence[Tensor]) -> None:
        self._view = view
        # What transformers passes to each layer beside the stream: masks, positions.
        self._arguments: list[list[dict[str, Any]]] = []
        self._dense: list[Tensor] = []
        for batch in batches:
            self._record(batch.to(view.device))
        self._pruned = list(self._dense)
        # The dense stream after each block of the layer.
        self._targets: dict[BlockKey, list[Tensor]] = {}

    def pass_dense(self, layer: int) -> None:
        """Let the dense stream through a layer that is still whole."""
        self._targets = {block.key: [] for block in self._view.of_layer(layer)}
        for batch, stream in enumerate(self._dense):
            behind, streams, _ = self._run(layer, batch, stream, None)
            assert behind is not None
            for block, after in zip(self._view.of_layer(layer), streams[1:], strict=True):
                self._targets[block.key].append(after)
            self._dense[batch] = behind

    def pass_pruned(self, layer: int) -> None:
        """Let the pruned stream through a layer that is repaired."""
        for batch, stream in enumerate(self._pruned):
            behind = self._run(layer, batch, stream, None)[0]
            assert behind is not None
            self._pruned[batch] = behind

    def moments(self, block: Block, columns: Tensor, samples: int, blend: float) -> list[_Moments]:
        """Over the first `samples` batches, and over the rest if there is one."""
        linear = block.output.linear
        dtype = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        weight = linear.weight.to(dtype)
        sizes = ((len(columns), len(columns)), (len(weight), len(columns)), ())
        parts = [[torch.zeros(size, dtype=dtype, device=weight.device) for size in sizes] for _ in range(2)]
        for batch, stream in enumerate(self._pruned):
            _, streams, x = self._run(block.layer, batch, stream, linear)
            assert x is not None
            before = streams[-1]
            own = x.to(dtype) @ weight.T
            wanted = (self._targets[block.key][batch] - before).to(dtype)
            if linear.bias is not None:
                wanted = wanted - linear.bias.to(dtype)
            target = torch.lerp(own, wanted, blend).flatten(0, -2)
            kept = x.to(dtype)[..., columns].flatten(0, -2)
            gram, cross, square = parts[batch >= samples]
            gram.addmm_(kept.T, kept)
            cross.addmm_(target.T, kept)
            square += target.square().sum()
        if not all(part[0].diagonal().isfinite().all() and part[2].isfinite() for part in parts):
            raise NonFiniteError(
                f"repair: the input of layer {block.layer}'s {block.output.path} is not finite; "
                "load the model in a wider dtype (bfloat16 or float32)"
            )
        found = [_Moments(*(tensor.double() for tensor in part)) for part in parts]
        return found if samples < len(self._pruned) else found[:1]

    def _run(
        self, layer: int, batch: int, stream: Tensor, stop_at: nn.Linear | None
    ) -> tuple[Tensor | None, list[Tensor], Tensor | None]:
        """The stream after a layer, before and after each block that ran, and the input of the linear it stopped at."""
        streams = [stream]
        reached: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            streams.append(streams[-1] + (output[0] if isinstance(output, tuple) else output))

        def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            reached.append(args[0])
            raise _StoppedError

        handles = [block.module.register_forward_hook(keep) for block in self._view.of_layer(layer)]
        if stop_at is not None:
            handles.append(stop_at.register_forward_pre_hook(stop))
        with _removed(handles):
            try:
                output = self._view.layers[layer](stream, **self._arguments[batch][layer])
            except _StoppedError:
                return None, streams, reached[0]
        return (output[0] if isinstance(output, tuple) else output), streams, None

    def _record(self, ids: Tensor) -> None:
        """One pass that keeps what enters the first layer, and what every layer is given beside the stream."""
        streams: list[Tensor] = []
        arguments: list[dict[str, Any]] = []

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            streams.append(args[0] if args else kwargs.pop("hidden_states"))
            arguments.append(kwargs)

        with _removed([layer.register_forward_pre_hook(record, with_kwargs=True) for layer in self._view.layers]):
            self._view.model.get_decoder()(input_ids=ids, use_cache=False)
        self._dense.append(streams[0])
        self._arguments.append(arguments)


@contextmanager
def _removed(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
