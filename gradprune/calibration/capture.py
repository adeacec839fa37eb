"""Capture: run a model's prunable linear layers so that their weight gradients are never kept.

While `capture(...)` is active, each prunable `nn.Linear` runs an autograd function that returns only the input
gradient and passes the factors of the weight gradient, x and dy, to an observer. Every parameter is frozen, so
the backward pass computes no other weight gradient either and leaves no `.grad` anywhere.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradprune.models.loss import times
from gradprune.models.modeling_gradprune import weight_of
from gradprune.models.modes import forward_replaced, frozen
from gradprune.models.recomputed import Product, Recomputation

Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called in the backward pass with x: [N, T, I], dy: [N, T, O] and dx: [N, T, I] of one linear layer."""


class _ObservedProduct(torch.autograd.Function):
    """An affine map of x whose backward pass calls an observer with (x, dy, dx)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product, transposed: Product, observer: Observer) -> Tensor:
        # x itself is saved, not an autocast copy, so that layers with the same input keep it once.
        ctx.save_for_backward(x)
        ctx.transposed, ctx.observer = transposed, observer
        output = product(x)
        if output._is_view():
            # Hide from autograd that it is a view, so that a layer can add to it in place. Nothing else shares its
            # memory.
            output = torch.ops.aten._unsafe_view(output, output.shape)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        dx = ctx.transposed(dy)
        ctx.observer(x.to(dy.dtype), dy, dx)
        return dx.to(x.dtype), None, None, None


def observed_product(x: Tensor, product: Product, transposed: Product, observer: Observer) -> Tensor:
    """Return product(x), differentiable only with respect to x; the observer is called in the backward pass.

    Args:
        x: [..., I], the input.
        product: an affine map of the last dimension, to [..., O].
        transposed: maps the gradient with respect to product(x) to the gradient with respect to x.
        observer: called with x and both gradients.
    """
    if not torch.is_grad_enabled():
        return product(x)
    output: Tensor = _ObservedProduct.apply(x, product, transposed, observer)  # type: ignore[no-untyped-call]
    return output


def observed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, observer: Observer, product: Product | None = None
) -> Tensor:
    """Return x W^T + b, observed as in `observed_product`; `product` computes it if given, else `F.linear`."""

    def transposed(dy: Tensor) -> Tensor:
        return times(dy, weight.to(dy.dtype))

    return observed_product(x, product or partial(F.linear, weight=weight, bias=bias), transposed, observer)


def _observed_forward(linear: nn.Linear, observer: Observer, recomputation: Recomputation, x: Tensor) -> Tensor:
    weight = weight_of(linear)
    product = recomputation.product(linear, partial(F.linear, weight=weight, bias=linear.bias))
    output = observed_linear(x, weight, linear.bias, observer, product)
    recomputation.computed(linear, output)
    return output


@contextmanager
def capture(
    model: PreTrainedModel, observers: dict[nn.Linear, Observer], recomputation: Recomputation | None = None
) -> Iterator[None]:
    """Context manager that observes the backward pass of `model`'s linear layers; the model is restored on exit.

    While it is active, all parameters are frozen, and the input embeddings' output requires a gradient, so that the
    backward pass runs through the whole model. The model is restored after an exception, too.

    Args:
        model: a causal LM.
        observers: for each linear layer to observe, the function to call in its backward pass.
        recomputation: decides which products are skipped when layers are recomputed in the backward pass; None: a new
            one, for layers that are not recomputed.
    """
    recomputation = recomputation or Recomputation()
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        embedding = model.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
        stack.callback(handle.remove)
        for linear, observer in observers.items():
            observed = partial(_observed_forward, linear, observer, recomputation)
            stack.enter_context(forward_replaced(linear, observed))
        yield
