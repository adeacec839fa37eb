"""Distillation: a cut model's weights move towards the dense model's predictions, all blocks at once.

Least squares repairs a block by itself, and cannot know what matters to the model's output. Here every four samples,
fewer where they are long, give one step down the gradient G of

    (1 - text) KL(dense || cut) + text NLL(samples),

a mean over tokens, in every prunable weight W [O, I]:

    W <- W - rate * decay * sqrt(D / I) * rms(W) * G / sqrt(r c^T / mean(r)),
    r_o = mean over i of G_oi^2,  c_i = mean over o of G_oi^2,

with D = KL(dense || cut) before the step, and `decay` falling from 1 to 0 over the steps. The last denominator is
Adafactor's estimate of the gradients' size (Shazeer and Stern 2018, arXiv:1804.04235), of this one step: nothing is
carried from step to step, and a gradient lives until its own weight has moved, in the backward pass. So the memory is
that of a pass that takes gradients, and not that of an optimizer.

A gradient without its size does not tell how far it is to the minimum. Near it the divergence grows with the square of
the distance: hence sqrt(D). With 1 / sqrt(I), what a weight writes changes by as much at any width (Yang et al. 2022,
arXiv:2203.03466). So one rate serves models of 260 thousand and of 135 million parameters, a tenth of which or half was
pruned.

The dense model's predictions come from the residual streams that the repair has followed anyway. A streamed model takes
the same steps layer by layer: each reads its weights twice and writes them once.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradprune.accumulation import accumulation_dtype
from gradprune.calibration.capture import Observer, capture
from gradprune.calibration.gram import add_product
from gradprune.config import DISTILL_JUDGED, DISTILL_TEXT, distill_step
from gradprune.models import PrunableModel, describe
from gradprune.models.backward import backpropagated, deterministic_attention, without_autocast
from gradprune.models.blocks import Projection
from gradprune.models.divergence import divergence_with_text
from gradprune.models.modes import evaluation_mode
from gradprune.models.passes import backward_by_layers, mean_loss
from gradprune.models.precision import rounded_products
from gradprune.models.recomputed import Recomputation, recomputed
from gradprune.models.residency import Residency, on_the_way
from gradprune.models.streams import Streams
from gradprune.progress import progress
from gradprune.run import Run
from gradprune.surgery.least_squares import Repaired
from gradprune.surgery.moments import first_minimum

logger = logging.getLogger(__name__)

RATE = 0.1
"""The first step's change, relative to a weight's size, where it has one input and the divergence is 1 nat a token."""
FACTORS = (1.0, 0.5, 0.25)
"""How much of all steps' change is made, descending; held-out samples choose. They might choose more than all of it:
they are of one kind of text, and other text would be predicted worse."""

_JUDGED_TOGETHER = 8


@dataclass(frozen=True)
class Distillation:
    """What it brought.

    samples: that gave the gradients. text: the share of their own tokens. factor: how much of the change was made; 0
    where none of it made the loss less. before, after: the cut model's loss on held-out samples, in nats per token.
    """

    samples: int
    text: float
    factor: float
    before: float
    after: float


def distil(
    view: PrunableModel,
    samples: Tensor,
    held_out: Tensor,
    dense: Tensor,
    *,
    text: float = DISTILL_TEXT,
    rate: float = RATE,
    factors: Sequence[float] = FACTORS,
    recompute: bool = False,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Distillation:
    """Train the weights of the blocks of linear layers, in place, in memory of their own; experts stay as they are.

    Args:
        view: the cut model. Where it is streamed, its moved weights are written to disk, layer by layer.
        samples: [N, T] int64, calibration ids, which give a step for every `distill_step(T)`, in this order.
        held_out: [M, T] int64, others, on which the result is judged; one at least.
        dense: [N, T, H], the dense model's residual stream after its last layer, for `samples`.
        text, rate: see above.
        factors: see `FACTORS`; from the first they are followed to where the loss falls.
        recompute: keep of each layer its input alone, and compute it again in the backward pass.
        seed: of the rounding to bfloat16, which is up or down with the probability that keeps the mean.
        advance: called after each step.

    Deterministic.
    """
    together = distill_step(samples.shape[1])
    batches = samples.split(together)
    judged = [batch.to(view.device) for batch in held_out.split(_JUDGED_TOGETHER)]
    trained = _Trained(view, batches, dense.split(together), text, seed)

    def attempt(factor: float) -> tuple[float, float]:
        trained.weights.go(factor)
        return mean_loss(view.model, judged), factor

    with evaluation_mode(view.model):
        before = mean_loss(view.model, judged)
        with trained.observed(recompute=recompute):
            for step in range(len(batches)):
                trained.step(step, rate * (1.0 - step / len(batches)))
                advance()
        trained.weights.arrive()
        after, factor = first_minimum(factors, 0, attempt, itemgetter(0))
        if not after < before:
            after, factor = before, 0.0
        trained.weights.go(factor)
    return Distillation(len(samples), text, factor, before, after)


class Taught(NamedTuple):
    """Arguments of `distil`."""

    samples: Tensor
    held_out: Tensor
    dense: Tensor


def taught_samples(run: Run, repaired: Repaired) -> Taught | None:
    """What a run's model is to learn from; None where it is not to, or where it lacks what it needs.

    With several ranks each gets the same samples, and takes the same steps.
    """
    count = min(run.config.samples_distilled(run.view.parameters), len(run.samples.calibration))
    if not count or not run.view.linear_blocks:
        return None
    if not len(run.samples.held_out):
        logger.warning(
            "the text leaves no held-out samples to judge distillation on, so there is none; give more text, or fewer "
            "--num_samples"
        )
        return None
    # The first batches of all ranks', of which each rank has the first of its own.
    own = len(run.ranks.share(run.calibration[: -(-count // run.config.batch_size)]))
    dense = torch.cat(run.ranks.joined(repaired.dense[:own]))[:count]
    return Taught(run.samples.calibration[:count], run.samples.held_out[:DISTILL_JUDGED], dense)


def distil_run(run: Run, model: PreTrainedModel, taught: Taught) -> Distillation:
    """`distil` a run's cut model, with progress; blocks of kinds that were not to be pruned stay as they are.

    Products of fp32 factors are rounded where that is faster: other samples change a gradient far more.
    """
    kinds = {block.kind.name for block in run.view.blocks}
    view = describe(model)
    view = replace(view, blocks=tuple(block for block in view.blocks if block.kind.name in kinds))
    steps = -(-len(taught.samples) // distill_step(run.config.seq_len))
    with progress(run.console, "Distilling", steps, "steps") as advance, rounded_products():
        return distil(
            view,
            *taught,
            text=run.config.distill_text,
            recompute=run.config.use_gradient_checkpointing,
            seed=run.config.seed,
            advance=advance,
        )


class _Trained:
    """A model whose prunable weights move in its backward pass."""

    def __init__(
        self, view: PrunableModel, batches: Sequence[Tensor], dense: Sequence[Tensor], text: float, seed: int
    ) -> None:
        self._view = view
        self._batches = [batch.to(view.device) for batch in batches]
        self._streams = Streams(view, batches)
        self._dense = dense
        self._text_weight = text
        self._rate = self._divergence = 0.0
        self._entries = [entry for block in view.linear_blocks for entry in block.projections]
        self._recomputation = Recomputation()
        at_random = any(entry.weight.dtype == torch.bfloat16 for entry in self._entries)
        devices = {view.device_of(layer) for layer in range(len(view.layers))} if at_random else set()
        self._generators = {device: torch.Generator(device).manual_seed(seed) for device in devices}
        self.weights = _InMemory(view) if view.residency is None else _OnDisk(view, view.residency)

    def observed(self, *, recompute: bool) -> ExitStack:
        """A context in which a backward pass moves the weights."""
        observers: dict[nn.Linear, Observer] = {entry.linear: partial(self._move, entry) for entry in self._entries}
        with ExitStack() as stack:
            stack.enter_context(deterministic_attention())
            stack.enter_context(capture(self._view.model, observers, self._recomputation))
            # A streamed model's layers are recomputed anyway.
            if recompute and self._view.residency is None:
                stack.enter_context(recomputed(self._view.layers, self._recomputation))
            return stack.pop_all()

    def step(self, batch: int, rate: float) -> None:
        """One batch forward and backward."""
        self._rate = rate
        with torch.enable_grad():
            if isinstance(self.weights, _OnDisk):
                self._run_by_layers(batch, self.weights.write_down)
            else:
                self._run_whole(batch)

    def _run_whole(self, batch: int) -> None:
        ids, model = self._batches[batch], self._view.model
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        loss = backpropagated(self._loss(batch, hidden), model.dtype)
        with without_autocast(self._view.device):
            loss.backward()

    def _run_by_layers(self, batch: int, passed: Callable[[int], None]) -> None:
        def loss(streams: Streams, number: int, stream: Tensor) -> Tensor:
            return self._loss(batch, streams.last_hidden(number, stream))

        backward_by_layers(self._view, [self._batches[batch]], self._recomputation, passed, loss)

    def _loss(self, batch: int, hidden: Tensor) -> Tensor:
        """What a step descends, given the decoder's last hidden states [N, T, H], a mean over tokens.

        Of its gradients the size does not matter, as long as it is within the range of their type: in float16 a sum
        over tokens is not. No token follows a sample's last one, which is left out.
        """
        with torch.no_grad():
            teacher_hidden = self._streams.last_hidden(batch, self._dense[batch].to(self._view.device))
        found, expected = (each[:, :-1].flatten(0, 1) for each in (hidden, teacher_hidden))
        next_tokens = self._batches[batch][:, 1:].flatten()
        loss, kl = divergence_with_text(self._view.model, found, expected, next_tokens, self._text_weight)
        self._divergence = max(kl.item(), 0.0)
        return loss

    @torch.no_grad()
    def _move(self, entry: Projection, x: Tensor, dy: Tensor, _dx: Tensor) -> None:
        """An observer of a linear layer."""
        weight = entry.weight
        gradient = torch.zeros(weight.shape, dtype=accumulation_dtype(weight), device=weight.device)
        add_product(gradient, dy.flatten(0, -2), x.flatten(0, -2))
        rate = self._rate * math.sqrt(self._divergence / weight.shape[1])
        descend(weight, gradient, rate, self._generators.get(weight.device))


class _InMemory:
    """The prunable weights of a model that is whole in memory, which get memory of their own."""

    def __init__(self, view: PrunableModel) -> None:
        parameters = [entry.linear.weight for block in view.linear_blocks for entry in block.projections]
        self._start = [(parameter, parameter.data) for parameter in parameters]
        self._end: list[Tensor] = []
        for block in view.linear_blocks:
            with view.rewriting(block, [f"{entry.path}.weight" for entry in block.projections]):
                pass

    def arrive(self) -> None:
        """The weights as they are now are where a factor of 1 leads."""
        self._end = [parameter.data for parameter, _ in self._start]

    @torch.no_grad()
    def go(self, factor: float) -> None:
        """The weights that a factor leads to."""
        for (parameter, start), end in zip(self._start, self._end, strict=True):
            if factor in (0.0, 1.0):
                parameter.data = end if factor else start
            else:
                parameter.data = on_the_way(start, end, factor)


class _OnDisk:
    """The prunable weights of a streamed model; methods as of `_InMemory`."""

    def __init__(self, view: PrunableModel, residency: Residency) -> None:
        self._residency = residency
        self._names = [
            (block.layer, f"{block.path}.{entry.path}.weight")
            for block in view.linear_blocks
            for entry in block.projections
        ]
        self._start = residency.weights(self._names)
        self._end = self._start

    def write_down(self, layer: int) -> None:
        """The weights of a layer, which is in memory, have moved."""
        for of_layer, name in self._names:
            if of_layer == layer:
                self._residency.replace(layer, name)

    def arrive(self) -> None:
        self._end = self._residency.weights(self._names)

    def go(self, factor: float) -> None:
        self._residency.go_between(self._start, self._end, factor)


def descend(weight: Tensor, gradient: Tensor, rate: float, generator: torch.Generator | None) -> None:
    """A step of a weight down its gradient, in place, as above; rounded once, to bfloat16 up or down at random.

    So small changes add up where each is less than the distance to the next number.

    Args:
        weight: [O, I] floating point.
        gradient: [O, I] fp32 or fp64, of any size; overwritten.
        rate: the change, relative to the weight's size.
        generator: on their device; for bfloat16.
    """
    square = gradient.square()
    rows, columns = square.mean(1), square.mean(0)
    # Where all of a row's or a column's gradients are zero, so is the change.
    tiny = torch.finfo(gradient.dtype).tiny
    size = weight.to(gradient.dtype).square().mean(1).mean().sqrt()
    gradient.mul_(rows.clamp_min(tiny).rsqrt()[:, None])
    of_columns = columns.clamp_min(tiny).rsqrt().mul_(rate * size * rows.mean().sqrt())
    if weight.dtype == gradient.dtype:
        weight.addcmul_(gradient, of_columns[None], value=-1.0)
        return
    exact = weight.to(gradient.dtype).addcmul_(gradient, of_columns[None], value=-1.0)
    if weight.dtype == torch.bfloat16:
        # bfloat16 is the upper half of fp32; a random lower half carries as often as that one is large.
        noise = torch.randint(0, 2**16, exact.shape, generator=generator, dtype=torch.int32, device=exact.device)
        exact = (exact.view(torch.int32) + noise).bitwise_and_(-(2**16)).view(torch.float32)
    weight.copy_(exact)
