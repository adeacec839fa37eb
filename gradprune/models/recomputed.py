"""Decoder layers that are recomputed in the backward pass, leaving out products that no gradient needs.

The forward pass of a layer keeps its input and builds no graph; the backward pass runs the layer again, builds its
graph and backpropagates through it. PyTorch's own activation checkpointing builds the graph in both runs, and every
saved tensor passes through Python; neither is needed if no weight has a gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gradprune.models.modes import forward_replaced

Product = Callable[[Tensor], Tensor]


class Recomputation:
    """Knows which products can be left out when a layer is recomputed.

    The output of a decoder layer's last linear layer usually enters only sums, whose backward pass needs no values: so
    it need not be recomputed. This is so if autograd saves nothing after it when the layer is recomputed for the first
    time.
    """

    def __init__(self) -> None:
        """Start without knowing any layer."""
        # For each linear layer whose output no backward pass reads, the output's dtype and width.
        self._unread: dict[nn.Module, tuple[torch.dtype, int]] = {}
        self._known: set[nn.Module] = set()
        self._again = False
        # The last product computed, as long as autograd has saved nothing after it; at most one.
        self._last: list[tuple[nn.Module, Tensor]] = []

    @contextmanager
    def of(self, layer: nn.Module) -> Iterator[None]:
        """Context manager in which `layer` is recomputed, for the sake of gradients only."""
        self._again = True
        self._last.clear()
        try:
            if layer in self._known:
                yield
                return
            with saved_tensors_hooks(self._saved, lambda tensor: tensor):
                yield
            self._known.add(layer)
            for linear, output in self._last:
                self._unread[linear] = (output.dtype, output.shape[-1])
        finally:
            self._again = False
            self._last.clear()

    def product(self, linear: nn.Module, product: Product) -> Product:
        """Return `product`, or, if no gradient reads the linear layer's output, a function that returns it unfilled."""
        return partial(self._unfilled, linear) if self._again and linear in self._unread else product

    def computed(self, linear: nn.Module, output: Tensor) -> None:
        """Note that a linear layer's output has been computed and autograd has saved what its gradient needs."""
        if self._again:
            self._last[:] = [(linear, output.detach())]

    def _saved(self, tensor: Tensor) -> Tensor:
        self._last.clear()
        return tensor

    def _unfilled(self, linear: nn.Module, x: Tensor) -> Tensor:
        dtype, width = self._unread[linear]
        return x.new_empty((*x.shape[:-1], width), dtype=dtype)


@contextmanager
def recomputed(layers: nn.ModuleList, recomputation: Recomputation) -> Iterator[None]:
    """Context manager in which layers are recomputed in the backward pass; until then only their inputs are kept.

    Only a layer's inputs get gradients, because parameters are frozen. It works in evaluation mode, too, where
    transformers' own gradient checkpointing does nothing.
    """
    with ExitStack() as stack:
        for layer in layers:
            again = partial(recomputation.of, layer)
            stack.enter_context(forward_replaced(layer, partial(_forward, layer.forward, again)))
        yield


def _forward(
    run: Callable[..., Any], again: Callable[[], AbstractContextManager[None]], *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    leaves, spec = tree_flatten((args, kwargs))
    return _Recomputed.apply(run, again, spec, *leaves)  # type: ignore[no-untyped-call]


class _Recomputed(torch.autograd.Function):
    """A layer as a function of the leaves of its arguments, whose nesting `spec` describes."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., Any],
        again: Callable[[], AbstractContextManager[None]],
        spec: TreeSpec,
        *leaves: Any,
    ) -> Any:
        needed = ctx.needs_input_grad[3:]
        entered = [leaf for leaf, needs in zip(leaves, needed, strict=True) if needs]
        ctx.save_for_backward(*entered)
        ctx.others = [None if needs else leaf for leaf, needs in zip(leaves, needed, strict=True)]
        ctx.run, ctx.again, ctx.spec = run, again, spec
        ctx.autocast = _autocast_as_here(entered[0].device) if entered else nullcontext
        ctx.set_materialize_grads(False)
        args, kwargs = tree_unflatten(leaves, spec)
        return run(*args, **kwargs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        needed = ctx.needs_input_grad[3:]
        entered = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        given = iter(entered)
        leaves = [next(given) if needs else leaf for leaf, needs in zip(ctx.others, needed, strict=True)]
        args, kwargs = tree_unflatten(leaves, ctx.spec)
        with torch.enable_grad(), ctx.autocast(), ctx.again():
            output = ctx.run(*args, **kwargs)
        outputs = output if isinstance(output, tuple) else (output,)
        used = [(value, gradient) for value, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
        found = iter(
            torch.autograd.grad(
                [value for value, _ in used], entered, [gradient for _, gradient in used], allow_unused=True
            )
        )
        return None, None, None, *(next(found) if needs else None for needs in needed)


def _autocast_as_here(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Make a context manager with the current autocast, which the backward pass turns off, see `without_autocast`."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext
    return partial(torch.autocast, device.type, torch.get_autocast_dtype(device.type))
