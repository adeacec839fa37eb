"""Capture: run a model's prunable linear layers so that their weight gradients are never kept.

Inside `capture(...)` each prunable `nn.Linear` runs an autograd function that returns only the input
gradient and hands the inputs of the weight gradient, x and dy, to an observer. Every parameter is frozen, so
the backward pass computes no other weight gradient either and leaves no `.grad` anywhere.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gradprune.models.loss import times
from gradprune.models.modeling_gradprune import weight_of
from gradprune.models.modes import forward_replaced, frozen

Product = Callable[[Tensor], Tensor]

Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called in the backward pass with x: [N, T, I], dy: [N, T, O] and dx: [N, T, I] of one linear layer."""


class _KeptInput(torch.autograd.Function):
    """x as it is, kept for the backward pass.

    A layer of its own, before the product: recomputation under checkpointing ends with the last tensor that it has to
    bring back, and so leaves out the product of a decoder layer's last linear layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # x itself is saved, not an autocast copy, so that layers with the same input keep it once.
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, dx: Tensor) -> Tensor:
        return dx


class _ObservedProduct(torch.autograd.Function):
    """y of an affine map whose backward shows (x, dy, dx) to an observer; x comes from _KeptInput."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product, transposed: Product, observer: Observer) -> Tensor:
        ctx.kept, ctx.transposed, ctx.observer = x.grad_fn, transposed, observer
        output = product(x)
        # No view for autograd, so that a layer can add to it in place; nothing else has its memory.
        unviewed: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
        return unviewed

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.kept.saved_tensors
        dx = ctx.transposed(dy)
        ctx.observer(x.to(dy.dtype), dy, dx)
        return dx.to(x.dtype), None, None, None


def observed_product(x: Tensor, product: Product, transposed: Product, observer: Observer) -> Tensor:
    """product(x), differentiable in x alone; the observer is called in the backward pass.

    Args:
        x: of any leading shape.
        product: an affine map of the last dimension.
        transposed: the gradient with respect to x, of that with respect to product(x).
        observer: sees both, and x.
    """
    kept = _KeptInput.apply(x)  # type: ignore[no-untyped-call]
    output: Tensor = _ObservedProduct.apply(kept, product, transposed, observer)  # type: ignore[no-untyped-call]
    return output


def observed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, observer: Observer) -> Tensor:
    """x W^T + b, as `observed_product`."""

    def transposed(dy: Tensor) -> Tensor:
        return times(dy, weight.to(dy.dtype))

    return observed_product(x, partial(F.linear, weight=weight, bias=bias), transposed, observer)


def _observed_forward(linear: nn.Linear, observer: Observer, x: Tensor) -> Tensor:
    return observed_linear(x, weight_of(linear), linear.bias, observer)


@contextmanager
def capture(model: PreTrainedModel, observers: dict[nn.Linear, Observer]) -> Iterator[None]:
    """Observe the backward pass of `model`'s linear layers; everything is as before on exit, whatever happened.

    While it is active all parameters are frozen, and the input embeddings' output requires a
    gradient, so that the backward pass runs through the whole model.

    Args:
        model: a causal LM.
        observers: for each linear layer to observe, what to call in its backward pass.
    """
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        embedding = model.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
        stack.callback(handle.remove)
        for linear, observer in observers.items():
            stack.enter_context(forward_replaced(linear, partial(_observed_forward, linear, observer)))
        yield


@contextmanager
def checkpointed(layers: nn.ModuleList) -> Iterator[None]:
    """Recompute each decoder layer in the backward pass instead of keeping its activations.

    Works in evaluation mode, where transformers' own switch does nothing.
    """
    with ExitStack() as stack:
        for layer in layers:
            # Dropout is off, so the random generator's state need not be saved for the recomputation.
            recomputed = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
            stack.enter_context(forward_replaced(layer, recomputed))
        yield
