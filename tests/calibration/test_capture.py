from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradprune.calibration.capture import capture
from gradprune.models import describe
from gradprune.models.loss import sample_losses
from gradprune.models.recomputed import Recomputation, recomputed
from helpers.tiny_models import tiny_ids, tiny_model

LAYERS = 3


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def products(architecture: str, recompute: bool) -> list[tuple[int, int]]:
    """The numbers of products in each of two steps' forward passes, without the head's, and backward passes."""
    model, ids = tiny_model(architecture, layers=LAYERS), tiny_ids()
    view = describe(model)
    observers = {entry.linear: lambda *_: None for block in view.blocks for entry in block.projections}
    recomputation = Recomputation()
    again = recomputed(view.layers, recomputation) if recompute else nullcontext()
    with capture(model, observers, recomputation), again:
        return [_count(model, ids) for _ in range(2)]


def _count(model, ids: torch.Tensor) -> tuple[int, int]:
    with Products() as forward:
        losses = sample_losses(model, ids)
    with Products() as backward:
        losses.sum().backward()
    return forward.count - 2, backward.count


@pytest.mark.parametrize(("architecture", "linears"), [("llama", 7), ("qwen2", 7), ("phi3", 4)])
def test_only_needed_products_are_computed(architecture: str, linears: int) -> None:
    """The backward pass computes each linear layer's dx, and no weight gradient.

    From the second step on, recomputing leaves out each decoder layer's last product.
    """
    forward = LAYERS * linears
    assert products(architecture, recompute=False) == [(forward, LAYERS * linears)] * 2
    assert products(architecture, recompute=True) == [(forward, 2 * LAYERS * linears), (forward, 2 * forward - LAYERS)]


def test_layers_with_the_same_input_keep_it_once() -> None:
    model, ids, kept = tiny_model(layers=1), tiny_ids(), []
    block = describe(model).blocks[0]
    inputs: set[int] = set()
    for entry in block.inputs:
        entry.linear.register_forward_pre_hook(lambda _module, args: inputs.add(args[0].data_ptr()))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t)
    with capture(model, {entry.linear: lambda *_: None for entry in block.inputs}), hooks:
        sample_losses(model, ids)
    assert len(inputs) == 1
    assert kept.count(inputs.pop()) == len(block.inputs)
