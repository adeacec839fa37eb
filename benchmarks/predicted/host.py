"""The host's time for a step of calibration, relative to that of the plain pass, measured without a GPU.

The model's tensors are so small that a step costs only what Python and PyTorch's dispatcher do for them:

    python -m benchmarks.predicted.host [--turns 9]     # a line for each kind of evidence

Triton kernels go through all of Triton's launch except for the driver's call. The time of this call, and of that in
every launch of PyTorch, is assumed to be in proportion to the speed of this host, because the driver, too, takes longer
on a slower one. Processor time is measured, in alternation with the plain pass, and the median of the ratios is taken,
because another process on the same cores slows both.
"""

import json
import os
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

# This must happen before Triton is imported, because its interpreter launches kernels in another way.
os.environ.pop("TRITON_INTERPRET", None)

import triton.runtime.jit
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.jobs.calibrators import checkpointed
from benchmarks.predicted.counted import Counted
from gradprune.calibration.engine import ImportanceEngine
from gradprune.config import Method
from gradprune.models import describe
from gradprune.ops import dispatch

# The driver's time for a launch, relative to the plain pass' own time per launch: 4 microseconds if that is 7.
DRIVER = 4.0 / 7.0
# The evidence that a step collects, as the method and the number of steps that score every weight's gradient (None:
# all).
EVIDENCE: dict[str, tuple[Method, int | None]] = {
    "needed": ("group_fisher", 0),
    "all": ("group_fisher", None),
    "needed by obs": ("obs", 0),
    "all, with obs": ("obs", None),
}
_LAYERS, _STEPS = 8, 5


class _Driver:
    """A stand-in for Triton's driver that reports a Hopper GPU."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class _Compiled:
    """A stand-in for a compiled Triton kernel that counts the launches of all."""

    function, packed_metadata = 0, ()
    launches = 0

    def launch_metadata(self, *_arguments: object) -> None:
        return None

    def run(self, *_arguments: object) -> None:
        _Compiled.launches += 1


def _compile(kernel: Any, key: str, _signature: object, device: int, *_options: object) -> _Compiled:
    made: _Compiled = kernel.device_caches[device][0].setdefault(key, _Compiled())
    return made


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Context manager under which an engine with a model on the CPU launches Triton kernels, without a driver."""
    ops = dispatch._importance_triton()
    with ExitStack() as stack:
        stack.enter_context(patch.object(driver, "_active", _Driver()))
        for name, stand_in in {
            "gradprune.calibration.engine.select_ops": lambda *_: ops,
            "gradprune.kernels.linear_importance.descriptors_work": lambda *_: True,
            # All logits in one chunk, as on a GPU.
            "gradprune.models.loss.LOGITS": 2**27,
        }.items():
            stack.enter_context(patch(name, stand_in))
        stack.enter_context(patch.object(triton.runtime.jit.JITFunction, "_do_compile", _compile))
        yield


def host_ratio(evidence: str, turns: int, recompute: bool = True) -> float:
    """Host time of an engine's step divided by that of the plain pass: the median over turns, including the driver."""
    model, ids = _model(), torch.zeros(2, 8, dtype=torch.int64)
    method, steps = EVIDENCE[evidence]

    def engine() -> AbstractContextManager[Callable[[], None]]:
        return _engine_steps(model, ids, method, steps, recompute)

    def plain() -> AbstractContextManager[Callable[[], None]]:
        return _plain_steps(model, ids, recompute)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with triton_on_cpu():
            launched = _launches(engine) / _launches(plain)
            ratio = statistics.median(_seconds(engine) / _seconds(plain) for _ in range(turns))
    finally:
        torch.set_num_threads(threads)
    return (ratio + DRIVER * launched) / (1.0 + DRIVER)


def _model() -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        num_hidden_layers=_LAYERS, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@contextmanager
def _engine_steps(
    model: PreTrainedModel, ids: Tensor, method: Method, steps: int | None, recompute: bool
) -> Iterator[Callable[[], None]]:
    engine = ImportanceEngine(model, method, use_gradient_checkpointing=recompute, weight_gradient_steps=steps)
    # The check reads results, which it does only on a CPU.
    with engine, patch.object(ImportanceEngine, "_check_step", lambda *_: None):
        yield lambda: engine.step(ids)


@contextmanager
def _plain_steps(model: PreTrainedModel, ids: Tensor, recompute: bool) -> Iterator[Callable[[], None]]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    with ExitStack() as stack:
        if recompute:
            stack.enter_context(checkpointed(describe(model).layers))
        yield step


def _seconds(entered: Callable[[], AbstractContextManager[Callable[[], None]]]) -> float:
    """Processor time of _STEPS steps, after one to warm up."""
    with entered() as step:
        step()
        start = time.process_time()
        for _ in range(_STEPS):
            step()
        return time.process_time() - start


def _launches(entered: Callable[[], AbstractContextManager[Callable[[], None]]]) -> int:
    """The number of launches in a step, after one to warm up."""
    with entered() as step:
        step()
        before = _Compiled.launches
        with Counted() as counted:
            step()
        return counted.total + _Compiled.launches - before


def main() -> None:
    """Print the ratio for each kind of evidence, with activations recomputed and with activations kept."""
    made = ArgumentParser(description=__doc__)
    made.add_argument("--turns", type=int, default=9)
    turns = made.parse_args().turns
    for evidence in EVIDENCE:
        found = {"recomputed": host_ratio(evidence, turns), "kept": host_ratio(evidence, turns, recompute=False)}
        print(json.dumps({"evidence": evidence, **found}), flush=True)


if __name__ == "__main__":
    main()
