"""Count a step of calibration at a model's full widths, with the engine and, for comparison, without it."""

from contextlib import ExitStack

import torch

from benchmarks.jobs.calibrators import checkpointed
from benchmarks.predicted.counted import Counted, counted_gpu, llama
from gradprune.calibration.capture import capture
from gradprune.calibration.engine import ImportanceEngine
from gradprune.config import Method
from gradprune.models import describe
from gradprune.models.loss import sample_losses
from gradprune.models.recomputed import Recomputation, recomputed


def engine_step(size: str, layers: int, method: Method, samples: int, tokens: int, *, every: bool = False) -> Counted:
    """Count a step of the engine with the evidence that `method` needs; activations are recomputed.

    Args:
        size: see `llama`.
        layers: see `llama`.
        method: the importance method.
        samples: in the step.
        tokens: of each sample.
        every: collect the evidence of every method.
    """
    with counted_gpu() as counted:
        steps = None if every else 0
        engine = ImportanceEngine(
            llama(size, layers), method, use_gradient_checkpointing=True, weight_gradient_steps=steps
        )
        ids = torch.zeros(samples, tokens, dtype=torch.int64, device="meta")
        with engine:
            # In its first step an engine finds out what it does not need to recompute.
            engine.step(ids[:1, :2])
            counted.forget()
            with counted:
                engine.step(ids)
    return counted


def plain_step(size: str, layers: int, samples: int, tokens: int, *, weights: bool = False) -> Counted:
    """Count the same forward and backward pass without the engine's own work; see `engine_step`.

    weights: compute every weight's gradient, as `loss.backward()` does, with activations recomputed by PyTorch;
        otherwise compute and recompute what the engine's pass does.
    """
    ids = torch.zeros(samples, tokens, dtype=torch.int64, device="meta")
    with counted_gpu() as counted, ExitStack() as stack:
        model = llama(size, layers)
        view = describe(model)
        if weights:
            stack.enter_context(checkpointed(view.layers))
        else:
            linears = [entry.linear for block in view.linear_blocks for entry in block.projections]
            recomputation = Recomputation()
            stack.enter_context(capture(model, dict.fromkeys(linears, lambda *_: None), recomputation))
            stack.enter_context(recomputed(view.layers, recomputation))
            sample_losses(model, ids[:1, :2]).sum().backward()
            counted.forget()
        stack.enter_context(counted)
        sample_losses(model, ids).sum().backward()
    return counted


def forward_pass(size: str, layers: int, samples: int, tokens: int) -> Counted:
    """Count a forward pass with each sample's loss, without gradients."""
    with counted_gpu() as counted:
        model = llama(size, layers)
        with counted, torch.no_grad():
            sample_losses(model, torch.zeros(samples, tokens, dtype=torch.int64, device="meta"))
    return counted
