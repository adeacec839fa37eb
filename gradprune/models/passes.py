"""Losses of batches: batch by batch if the model is whole, layer by layer for many batches if it is streamed.

A streamed model's batches advance together, so that each layer is read once for all of them. Either way, the same
operations are computed for a batch in the same order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradprune.models import PrunableModel, describe
from gradprune.models.backward import backpropagated, without_autocast
from gradprune.models.loss import sample_losses
from gradprune.models.recomputed import Recomputation
from gradprune.models.residency import residency_of
from gradprune.models.streams import Streams, stream_bytes


def losses(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    watched: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Tensor]:
    """Yield the samples' losses of each batch, [N] on the model's device, in nats per token; not differentiable.

    Args:
        model: a causal LM, whole or streamed.
        batches: token ids, [N, T] int64 each.
        watched: makes a context manager in which the layers run; in it, each layer is called exactly once per batch.
    """
    if residency_of(model) is None:
        for batch in batches:
            with watched():
                found = sample_losses(model, batch.to(model.device)).detach()
            yield found
        return
    view = describe(model)
    # Each batch has two streams in memory at a time: before and after a layer.
    for wave in waves(view, batches, kept=2):
        streams = Streams(view, wave, 2 * stream_bytes(view, wave))
        current = streams.take_first()
        with watched():
            for layer in range(len(view.layers)):
                current = [streams.run_layer(layer, k, stream) for k, stream in enumerate(current)]
        for k, stream in enumerate(current):
            yield streams.losses(k, stream.to(view.device)).detach()


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Sequence[Tensor]) -> float:
    """Mean of the loss l_n over the samples of all batches [N, T], in nats per token."""
    return losses_of(model, batches).mean().item()


@torch.no_grad()
def losses_of(model: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
    """The loss l_n of each sample of all batches [N, T], in nats per token: [samples] fp64 on the CPU."""
    return torch.cat(list(losses(model, batches))).double().cpu()


def waves(view: PrunableModel, batches: Sequence[Tensor], kept: int) -> Iterator[list[Tensor]]:
    """Yield lists of consecutive batches that pass through a model's layers together.

    A list has one batch if the model is whole, and as many as have room for their streams in its budget if it is
    streamed, but at least one.

    Args:
        view: the model.
        batches: token ids, [N, T] int64 each.
        kept: the number of residual streams [N, T, H] of each batch that are in memory at the same time.
    """
    residency = view.residency
    budget = 0 if residency is None else residency.budget
    wave: list[Tensor] = []
    taken = 0
    for batch in batches:
        size = kept * stream_bytes(view, [batch])
        if wave and taken + size > budget:
            yield wave
            wave, taken = [], 0
        wave.append(batch)
        taken += size
    if wave:
        yield wave


@dataclass(frozen=True)
class Variant:
    """The model with some layers changed.

    at: makes, from a layer's index, the context manager in which this layer runs; it undoes its changes on exit.
    layers: the indices of the changed layers, at least one.
    """

    at: Callable[[int], AbstractContextManager[None]]
    layers: Sequence[int]


@torch.no_grad()
def variant_losses(view: PrunableModel, batches: Sequence[Tensor], variants: Sequence[Variant]) -> Iterator[Tensor]:
    """Yield, for each variant, each sample's loss in nats per token: [samples] fp64 on the CPU.

    If the model is streamed, many variants pass through a layer while it is in memory, and a variant shares the
    unchanged model's stream up to the first layer that it changes.
    """
    if view.residency is None:
        for variant in variants:
            with ExitStack() as stack:
                for layer in variant.layers:
                    stack.enter_context(variant.at(layer))
                found = losses_of(view.model, batches)
            yield found
        return
    together = max(1, view.residency.budget // stream_bytes(view, batches) - 2)
    for start in range(0, len(variants), together):
        yield from _streamed_losses(view, batches, variants[start : start + together])


def _streamed_losses(view: PrunableModel, batches: Sequence[Tensor], variants: Sequence[Variant]) -> list[Tensor]:
    streams = Streams(view, batches, (len(variants) + 2) * stream_bytes(view, batches))
    common = streams.take_first()
    current: list[list[Tensor]] = [[] for _ in variants]
    for layer in range(len(view.layers)):
        with view.resident(layer, layer + 1):
            for number, variant in enumerate(variants):
                if layer < min(variant.layers):
                    continue
                before = current[number] or common
                with ExitStack() as stack:
                    if layer in variant.layers:
                        stack.enter_context(variant.at(layer))
                    current[number] = [streams.run_layer(layer, k, stream) for k, stream in enumerate(before)]
            if any(layer < min(variant.layers) for variant in variants):
                common = [streams.run_layer(layer, k, stream) for k, stream in enumerate(common)]
    return [streams.losses_of(each) for each in current]


def backward_by_layers(
    view: PrunableModel,
    batches: Sequence[Tensor],
    recomputation: Recomputation,
    passed: Callable[[int], None],
    losses: Callable[[Streams, int, Tensor], Tensor] = Streams.losses,
) -> list[Tensor]:
    """Backpropagate the sum of each batch's losses through a streamed model; each weight is read twice.

    All gradients are multiplied by `loss_scale`.

    The computation is that of a whole model that recomputes its layers in the backward pass: forward without gradients,
    keeping the stream before every layer in the host's memory; then, from the last layer to the first, forward again
    and backward.

    Args:
        view: the model, whose parameters are frozen.
        batches: token ids, [N, T] int64 each, on the model's device.
        recomputation: knows which products need not be recomputed.
        passed: called with the layer's index after each batch's backward pass through it, while the layer's weights are
            in memory.
        losses: computes a batch's losses from the streams, the batch's index and its stream [N, T, H] after the last
            layer, in which they are differentiable. By default, the loss of each sample.

    Returns:
        The losses of each batch, detached.
    """
    streams = Streams(view, batches, (len(view.layers) + 1) * stream_bytes(view, batches))
    before: list[list[Tensor]] = [[stream.detach() for stream in streams.take_first()]]
    with torch.no_grad():
        for layer in range(len(view.layers)):
            before.append([streams.run_layer(layer, k, stream) for k, stream in enumerate(before[-1])])
    found_losses, gradients = [], []
    for k, stream in enumerate(before.pop()):
        top = stream.to(view.device).requires_grad_()
        found_losses.append(losses(streams, k, top))
        with without_autocast(view.device):
            found = torch.autograd.grad(backpropagated(found_losses[-1], view.model.dtype), top)[0]
        gradients.append(streams.keep(found))
    for layer in reversed(range(len(view.layers))):
        with view.resident(layer, layer - 1):
            for k, stream in enumerate(before.pop()):
                gradients[k] = _backward_of_layer(streams, view, recomputation, layer, k, stream, gradients[k])
                passed(layer)
    return [each.detach() for each in found_losses]


def _backward_of_layer(
    streams: Streams,
    view: PrunableModel,
    recomputation: Recomputation,
    layer: int,
    batch: int,
    stream: Tensor,
    gradient: Tensor,
) -> Tensor:
    """Return the gradient with respect to a layer's input, [N, T, H], given the gradient with respect to its output.

    It is a function of its own so that the graph is freed on return: the graph would keep the layer's weights in memory
    while the next layer's are read.
    """
    entered = stream.to(view.device).requires_grad_()
    with recomputation.of(view.layers[layer]):
        after = streams.run_layer_on_device(layer, batch, entered)
    with without_autocast(view.device):
        found = torch.autograd.grad(after, entered, gradient.to(view.device))[0]
    return streams.keep(found)
