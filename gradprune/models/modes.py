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
    """Evaluation mode, without dropout; on exit every module has its previous mode."""
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
    """The settings that a checkpoint recommends for chats, such as a temperature or a penalty, are left aside.

    Also the tokens with which its texts end.
    """
    recommended = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = recommended


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient; on exit those that did require one again."""
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
    """On exit, parameters and buffers, which are in memory, have the values they had."""
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in saved:
                tensor.copy_(before)


@contextmanager
def value_replaced(parameter: nn.Parameter, value: Tensor) -> Iterator[None]:
    """A parameter, which is in memory, is `value`, of the same shape; its own memory is left alone."""
    before = parameter.data
    parameter.data = value
    try:
        yield
    finally:
        parameter.data = before


@contextmanager
def seeded(seed: int, device: torch.device = _CPU) -> Iterator[None]:
    """Inside, PyTorch draws from `seed` on, on the CPU and where `device` is a GPU on all GPUs.

    Outside, the caller's random numbers are as they would have been.
    """
    gpus = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with torch.random.fork_rng(gpus):
        # `torch.manual_seed` seeds GPUs, too, whose states are not restored where the work is the CPU's.
        (torch.manual_seed if gpus else torch.default_generator.manual_seed)(seed)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """CPU work inside gets the same bits at any number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def hooks_removed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """On exit, the hooks of these handles, which are there already, are gone."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` runs `forward` instead of its own."""
    # An instance attribute hides the class's forward; deleting it brings that back.
    replaced = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if replaced is not None:
            module.forward = replaced
