"""Decoder layers that are computed again in the backward pass, without what no gradient needs.

The forward pass of a layer keeps its input and builds no graph; the backward pass runs the layer again, with its graph,
and goes back through that. PyTorch's own checkpoints build the graph of both runs, and every tensor that is kept passes
through Python; neither is needed where no weight has a gradient.
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
    """Which products are left out when a layer is computed again.

    The output of a layer's last linear layer usually enters only sums, whose backward pass needs no values: it need not
    be computed again. That is so where autograd keeps nothing after it when the layer is first recomputed.
    """

    def __init__(self) -> None:
        """Nothing is known of any layer."""
        # By linear layer whose output nothing reads, the output's dtype and width.
        self._unread: dict[nn.Module, tuple[torch.dtype, int]] = {}
        self._known: set[nn.Module] = set()
        self._again = False
        # The last product so far, where autograd has kept nothing since.
        self._last: list[tuple[nn.Module, Tensor]] = []

    @contextmanager
    def of(self, layer: nn.Module) -> Iterator[None]:
        """Inside the context `layer` is computed again, for gradients alone."""
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
        """What computes a linear layer's output: `product`, or what only takes its memory where nothing reads it."""
        return partial(self._unfilled, linear) if self._again and linear in self._unread else product

    def computed(self, linear: nn.Module, output: Tensor) -> None:
        """A linear layer's output has been computed, and what autograd needs for its gradient is kept."""
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
    """Inside the context layers are computed again in the backward pass; until then their input is kept, no more.

    Only what enters a layer gets a gradient: parameters are frozen. Works in evaluation mode, where transformers' own
    switch does nothing.
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
    """A layer of its arguments' leaves, which lie in them as `spec` says."""

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
        pairs = [(one, found) for one, found in zip(outputs, gradients, strict=True) if found is not None]
        found = iter(
            torch.autograd.grad([one for one, _ in pairs], entered, [of for _, of in pairs], allow_unused=True)
        )
        return None, None, None, *(next(found) if needs else None for needs in needed)


def _autocast_as_here(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A context with the autocast that is on here: a backward pass has none, see `without_autocast`."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext
    return partial(torch.autocast, device.type, torch.get_autocast_dtype(device.type))
