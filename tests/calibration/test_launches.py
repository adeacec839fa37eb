"""What a step launches on a GPU, counted without one, at the shapes of Llama-3: a gate on launches and workspace."""

from collections import Counter
from contextlib import ExitStack
from functools import cache

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its launches are NOT counted here")

from gradprune.calibration.capture import capture, checkpointed
from gradprune.calibration.engine import ImportanceEngine
from gradprune.config import Method
from gradprune.kernels.linear_importance import WORKSPACE
from gradprune.models import describe
from gradprune.models.loss import sample_losses
from helpers.fake_gpu import Launches, fake_gpu, llama

SAMPLES, TOKENS = 4, 2048
# Of the engine in a decoder layer of seven projections: when every weight's gradient is scored, and where the default
# method needs none.
LAUNCHES = {"taylor_2nd": 40, "group_fisher": 15}


@cache
def step(
    size: str, layers: int, method: Method = "taylor_2nd", samples: int = SAMPLES, tokens: int = TOKENS
) -> Launches:
    """A step that collects what the method needs."""
    with pytest.MonkeyPatch.context() as patch, fake_gpu(patch) as counted:
        engine = ImportanceEngine(llama(size, layers), method, use_gradient_checkpointing=True, weight_gradient_steps=0)
        ids = torch.zeros(samples, tokens, dtype=torch.int64, device="meta")
        with engine, counted:
            engine.step(ids)
    return counted


@cache
def plain(size: str, layers: int) -> Launches:
    """The same forward and backward pass, without what the engine makes of it."""
    with pytest.MonkeyPatch.context() as patch, fake_gpu(patch) as counted, ExitStack() as stack:
        model = llama(size, layers)
        view = describe(model)
        linears = [entry.linear for block in view.blocks for entry in block.projections]
        stack.enter_context(capture(model, dict.fromkeys(linears, lambda *_: None)))
        stack.enter_context(checkpointed(view.layers))
        stack.enter_context(counted)
        sample_losses(model, torch.zeros(SAMPLES, TOKENS, dtype=torch.int64, device="meta")).sum().backward()
    return counted


def a_layer_s(found: list[Launches]) -> int:
    """Launches that the second layer adds."""
    one, two = found
    return two.total - one.total


@pytest.mark.parametrize("method", LAUNCHES)
@pytest.mark.parametrize("size", ["8B", "70B", "405B"])
def test_a_layer_adds_few_launches(size: str, method: Method) -> None:
    """That no step reads anything back to the host is checked too: it would raise."""
    ours = a_layer_s([step(size, layers, method) for layers in (1, 2)])
    theirs = a_layer_s([plain(size, layers) for layers in (1, 2)])
    assert 0 < ours - theirs <= LAUNCHES[method], step(size, 1, method).by_name


@pytest.mark.parametrize("size", ["8B", "70B", "405B"])
def test_partial_sums_stay_within_the_workspace(size: str) -> None:
    assert 0 < step(size, 1).workspace <= WORKSPACE


def compilations(counted: Launches) -> dict[str, int]:
    """How often each kernel is compiled."""
    return dict(Counter(name for name, _ in set(counted.kernels)))


def test_a_model_takes_few_compilations_whatever_the_batches() -> None:
    """Of the product by rows and by columns, and the same ones for one sample and for tokens of any number."""
    found = compilations(step("8B", 1))
    assert found == {"linear_importance": 2, "recount": 1, "add": 1, "mask_gradient": 1}
    both = Launches(kernels=step("8B", 1).kernels + step("8B", 1, samples=1, tokens=1001).kernels)
    assert compilations(both)["linear_importance"] == 2
