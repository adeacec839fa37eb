"""Context managers that change a model's or PyTorch's state and restore it on exit, after an exception too."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig, PreTrainedModel

_CPU = torch.device("cpu")


@contextmanager
def evaluation_mode(*models: PreTrainedModel) -> Iterator[None]:
    """Put models into evaluation mode, without dropout; on exit every module has its previous mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Ignore the generation settings that a checkpoint recommends for chats, such as a temperature or a penalty.

    The tokens that would end a generated text are ignored, too.
    """
    recommended = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = recommended


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters; on exit, the parameters that required a gradient before do so again."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def values_restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore, on exit, the values that parameters and buffers, which are in memory, have now."""
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in saved:
                tensor.copy_(before)


@contextmanager
def value_replaced(parameter: nn.Parameter, value: Tensor) -> Iterator[None]:
    """Make a parameter, which is in memory, refer to `value`, of its shape; its own memory is not written to."""
    before = parameter.data
    parameter.data = value
    try:
        yield
    finally:
        parameter.data = before


@contextmanager
def seeded(seed: int, device: torch.device = _CPU) -> Iterator[None]:
    """Seed PyTorch's random generators: the CPU's and, if `device` is a GPU, those of all GPUs.

    On exit, the generators' states are restored, so that the caller's random numbers do not change.
    """
    gpus = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with torch.random.fork_rng(gpus):
        # If the work is done on the CPU, the GPUs' states are not restored, so `torch.manual_seed`, which would seed
        # them, too, is not used.
        (torch.manual_seed if gpus else torch.default_generator.manual_seed)(seed)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch's CPU work on one thread, so that the result has the same bits at any number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def hooks_removed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove, on exit, the hooks of these handles, which are registered already."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Make `module` run `forward` instead of its own forward method."""
    # An instance attribute hides the class's method until it is deleted.
    replaced = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if replaced is not None:
            module.forward = replaced
