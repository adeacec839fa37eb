"""A step of calibration at a model's full widths, counted: with the engine, and the plain pass beside it."""

from contextlib import ExitStack

import torch

from benchmarks.predicted.counted import Counted, counted_gpu, llama
from gradprune.calibration.capture import capture, checkpointed
from gradprune.calibration.engine import ImportanceEngine
from gradprune.config import Method
from gradprune.models import describe
from gradprune.models.loss import sample_losses


def engine_step(size: str, layers: int, method: Method, samples: int, tokens: int) -> Counted:
    """A step that collects what `method` needs, activations recomputed; `size` and `layers` as for `llama`."""
    with counted_gpu() as counted:
        engine = ImportanceEngine(llama(size, layers), method, use_gradient_checkpointing=True, weight_gradient_steps=0)
        ids = torch.zeros(samples, tokens, dtype=torch.int64, device="meta")
        with engine, counted:
            engine.step(ids)
    return counted


def plain_step(size: str, layers: int, samples: int, tokens: int, *, weights: bool = False) -> Counted:
    """The same forward and backward pass, without what the engine makes of it.

    weights: with every weight's gradient, as `loss.backward()` takes it; otherwise none is, as in the engine's pass.
    """
    with counted_gpu() as counted, ExitStack() as stack:
        model = llama(size, layers)
        view = describe(model)
        if not weights:
            linears = [entry.linear for block in view.linear_blocks for entry in block.projections]
            stack.enter_context(capture(model, dict.fromkeys(linears, lambda *_: None)))
        stack.enter_context(checkpointed(view.layers))
        stack.enter_context(counted)
        ids = torch.zeros(samples, tokens, dtype=torch.int64, device="meta")
        sample_losses(model, ids).sum().backward()
    return counted


def forward_pass(size: str, layers: int, samples: int, tokens: int) -> Counted:
    """Each sample's loss, without gradients."""
    with counted_gpu() as counted:
        model = llama(size, layers)
        with counted, torch.no_grad():
            sample_losses(model, torch.zeros(samples, tokens, dtype=torch.int64, device="meta"))
    return counted
