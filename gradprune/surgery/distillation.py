"""Distillation: train all prunable weights of a cut model together, towards the dense model's predictions.

Least squares repairs each block by itself, and cannot know what matters to the model's output. Here every four samples,
or fewer if they are long, give one step down the gradient G of

    (1 - text) KL(dense || cut) + text NLL(samples),

a mean over tokens, for every prunable weight W [O, I]:

    W <- W - rate * decay * sqrt(D / I) * rms(W) * G / sqrt(r c^T / mean(r)),
    r_o = mean over i of G_oi^2,  c_i = mean over o of G_oi^2,

with D = KL(dense || cut) before the step, and `decay` falling from 1 to 0 over the steps. The last denominator is
Adafactor's estimate of the gradients' size (Shazeer and Stern 2018, arXiv:1804.04235), from this step only: no state is
carried from step to step, and each gradient is freed during the backward pass, as soon as its weight has moved. So no
more memory is needed than for a backward pass.

A gradient divided by its size does not show how far away the minimum is. Near the minimum, the divergence grows with
the square of the distance: hence the factor sqrt(D). The factor 1 / sqrt(I) makes a weight's output change by the same
amount at any width (Yang et al. 2022, arXiv:2203.03466). So one rate serves models of 260 thousand and of 135 million
parameters, of which a tenth or a half was pruned.

The dense model's predictions come from its last residual streams, which the repair has computed anyway. A streamed
model takes the same steps layer by layer: each step reads the weights twice and writes them once.
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
"""The first step's change relative to a weight's size, if it has one input and the divergence is 1 nat per token."""
FACTORS = (1.0, 0.5, 0.25)
"""Candidates, descending, for how much of all steps' total change is kept; held-out samples choose. Factors above 1 are
not offered: the samples, being of one kind of text, might choose them, and other text would be predicted worse."""

_HELD_OUT_BATCH = 8


@dataclass(frozen=True)
class Distillation:
    """The outcome of a distillation.

    samples: the number of samples trained on. text: the weight of the next-token loss. factor: how much of the change
    was kept; 0 if no factor reduced the loss. before, after: the cut model's loss on held-out samples, in nats per
    token.
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
    """Train the weights of blocks of linear layers in place, in memory of their own; routed experts do not change.

    Args:
        view: the cut model. If it is streamed, its changed weights are written to disk, layer by layer.
        samples: [N, T] int64, token ids of calibration samples; each `distill_step(T)` of them give a step, in order.
        held_out: [M, T] int64, token ids of the held-out samples that the result is judged on; at least one.
        dense: [N, T, H], the dense model's residual stream after its last layer, for `samples`.
        text, rate: see the module's docstring.
        factors: see `FACTORS`; they are tried in order for as long as the loss falls.
        recompute: whether to keep only each layer's input, and recompute the layer in the backward pass.
        seed: for rounding to bfloat16, up or down at random with the exact value as the mean.
        advance: called after each step.

    The result is deterministic.
    """
    together = distill_step(samples.shape[1])
    batches = samples.split(together)
    judged = [batch.to(view.device) for batch in held_out.split(_HELD_OUT_BATCH)]
    trained = _Trained(view, batches, dense.split(together), text, seed)

    def attempt(factor: float) -> tuple[float, float]:
        trained.weights.move_to(factor)
        return mean_loss(view.model, judged), factor

    with evaluation_mode(view.model):
        before = mean_loss(view.model, judged)
        with trained.observed(recompute=recompute):
            for step in range(len(batches)):
                trained.step(step, rate * (1.0 - step / len(batches)))
                advance()
        trained.weights.mark_end()
        after, factor = first_minimum(factors, 0, attempt, itemgetter(0))
        if not after < before:
            after, factor = before, 0.0
        trained.weights.move_to(factor)
    return Distillation(len(samples), text, factor, before, after)


class Taught(NamedTuple):
    """What a model is distilled from; for the fields see the arguments of `distil`."""

    samples: Tensor
    held_out: Tensor
    dense: Tensor


def taught_samples(run: Run, repaired: Repaired) -> Taught | None:
    """What a run's model is to be distilled from; None if it is not to be distilled, or cannot be.

    Without linear blocks or held-out samples it cannot be. With several ranks, every rank gets the same samples and
    takes the same steps.
    """
    count = min(run.config.samples_distilled(run.view.parameters), len(run.samples.calibration))
    if not count or not run.view.linear_blocks:
        return None
    if not len(run.samples.held_out):
        logger.warning(
            "the text leaves no held-out samples to judge distillation on, so the model is not distilled; give more "
            "text, or fewer --num_samples"
        )
        return None
    # How many of this rank's batches are among the first batches of all ranks, which hold the samples.
    own = len(run.ranks.share(run.calibration[: -(-count // run.config.batch_size)]))
    dense = torch.cat(run.ranks.joined(repaired.dense[:own]))[:count]
    return Taught(run.samples.calibration[:count], run.samples.held_out[:DISTILL_JUDGED], dense)


def distil_run(run: Run, model: PreTrainedModel, taught: Taught) -> Distillation:
    """`distil` a run's cut model, showing progress; blocks of kinds that were not to be pruned do not change.

    Factors of fp32 products are rounded where that is faster: the choice of samples changes a gradient far more.
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
    """A model whose prunable weights are changed during its backward pass."""

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
        """Enter the contexts in which a backward pass changes the weights; the result closes them."""
        observers: dict[nn.Linear, Observer] = {entry.linear: partial(self._move, entry) for entry in self._entries}
        with ExitStack() as stack:
            stack.enter_context(deterministic_attention())
            stack.enter_context(capture(self._view.model, observers, self._recomputation))
            # A streamed model's layers are recomputed anyway.
            if recompute and self._view.residency is None:
                stack.enter_context(recomputed(self._view.layers, self._recomputation))
            return stack.pop_all()

    def step(self, batch: int, rate: float) -> None:
        """Take a step at this rate: run one batch forward and backward."""
        self._rate = rate
        with torch.enable_grad():
            if isinstance(self.weights, _OnDisk):
                self._run_by_layers(batch, self.weights.save_layer)
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
        """The loss of a step, a mean over tokens, given the decoder's last hidden states [N, T, H].

        The size of its gradients does not matter as long as it is within the range of their type; in float16, the
        gradients of a sum over tokens would not be. A sample's last token, which no token follows, is left out.
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
        """Observe a linear layer's backward pass: compute its weight's gradient, and take the step of this weight."""
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

    def mark_end(self) -> None:
        """Take the current weights as those of factor 1."""
        self._end = [parameter.data for parameter, _ in self._start]

    @torch.no_grad()
    def move_to(self, factor: float) -> None:
        """Set the weights at `factor` of the way from those before the steps (0) to those after them (1)."""
        for (parameter, start), end in zip(self._start, self._end, strict=True):
            if factor in (0.0, 1.0):
                parameter.data = end if factor else start
            else:
                parameter.data = on_the_way(start, end, factor)


class _OnDisk:
    """The prunable weights of a streamed model; for the methods see `_InMemory`."""

    def __init__(self, view: PrunableModel, residency: Residency) -> None:
        self._residency = residency
        self._names = [
            (block.layer, f"{block.path}.{entry.path}.weight")
            for block in view.linear_blocks
            for entry in block.projections
        ]
        self._start = residency.weights(self._names)
        self._end = self._start

    def save_layer(self, layer: int) -> None:
        """Write the changed weights of a layer, which is in memory, to disk."""
        for of_layer, name in self._names:
            if of_layer == layer:
                self._residency.replace(layer, name)

    def mark_end(self) -> None:
        self._end = self._residency.weights(self._names)

    def move_to(self, factor: float) -> None:
        self._residency.go_between(self._start, self._end, factor)


def descend(weight: Tensor, gradient: Tensor, rate: float, generator: torch.Generator | None) -> None:
    """Take a step of a weight down its gradient, in place, by the formula in the module's docstring.

    The result is rounded once; to bfloat16 it is rounded up or down at random, so that small changes add up even if
    each is less than the distance to the next number.

    Args:
        weight: [O, I] floating point.
        gradient: [O, I] fp32 or fp64, of any size; overwritten.
        rate: rate * decay * sqrt(D / I) of the formula, the change relative to the weight's size.
        generator: a random generator on the weight's device; needed for bfloat16 only.
    """
    square = gradient.square()
    rows, columns = square.mean(1), square.mean(0)
    # If all gradients of a row or a column are zero, the clamp makes the change zero, too, and not NaN.
    tiny = torch.finfo(gradient.dtype).tiny
    size = weight.to(gradient.dtype).square().mean(1).mean().sqrt()
    gradient.mul_(rows.clamp_min(tiny).rsqrt()[:, None])
    of_columns = columns.clamp_min(tiny).rsqrt().mul_(rate * size * rows.mean().sqrt())
    if weight.dtype == gradient.dtype:
        weight.addcmul_(gradient, of_columns[None], value=-1.0)
        return
    exact = weight.to(gradient.dtype).addcmul_(gradient, of_columns[None], value=-1.0)
    if weight.dtype == torch.bfloat16:
        # bfloat16 is the upper half of fp32's bits. Adding a random lower half carries into the upper half with a
        # probability proportional to the number's own lower half.
        noise = torch.randint(0, 2**16, exact.shape, generator=generator, dtype=torch.int32, device=exact.device)
        exact = (exact.view(torch.int32) + noise).bitwise_and_(-(2**16)).view(torch.float32)
    weight.copy_(exact)
