"""A second device beside the CPU, for tests: tensors that report the meta device as theirs, but have values.

Within `second_device()`, operations on tensors of the meta device are computed on the CPU, so that the results equal
those of a single device bit for bit. An operation on tensors of both devices raises, as it would with two GPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

SECOND = torch.device("meta")
FIRST = torch.device("cpu")


class _OnSecond(Tensor):
    """A tensor on the second device; `held` is a CPU tensor with its values."""

    held: Tensor
    # A meta tensor has no values, but this one does.
    is_meta = False

    @staticmethod
    def __new__(cls, held: Tensor) -> "_OnSecond":
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=SECOND, requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        return self.held.tolist()

    @property
    def data(self) -> Tensor:
        return _OnSecond(self.held)

    @data.setter
    def data(self, value: "_OnSecond") -> None:
        # As with any tensor, references to it see the new values; tensors that shared its memory keep the old ones.
        self.held = value.held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute_on_cpu(func, args, kwargs)


class _Devices(TorchDispatchMode):
    """Handles also operations that create tensors on a device, or copy them from one device to the other."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute_on_cpu(func, args, kwargs)


def _compute_on_cpu(func, args, kwargs):
    """Compute on the CPU; the result is on the device that was asked for, or else on the device of the tensors."""
    kwargs = dict(kwargs or {})
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    # As on a GPU, zero-dimensional tensors may be on the CPU.
    devices = {value.device for value in tensors if value.dim() or isinstance(value, _OnSecond)}
    name = func.name().removeprefix("aten::")
    moves = name.startswith(("_to_copy", "copy_", "_local_scalar_dense"))
    # The tensor of indices may be on the CPU, too.
    if name.startswith("index") and not name.startswith("index_"):
        devices = {args[0].device}
    if len(devices) > 1 and not moves:
        raise RuntimeError(f"{name}: tensors on {devices}")
    asked = kwargs.get("device")
    target = torch.device(asked) if asked is not None else next(iter(devices), FIRST)
    if name.startswith("copy_"):
        target = args[0].device
    if asked is not None:
        kwargs["device"] = FIRST
    args, kwargs = tree_map_only(_OnSecond, lambda value: value.held, (args, kwargs))
    found = func(*args, **kwargs)
    return tree_map_only(Tensor, _OnSecond, found) if target == SECOND else found


@contextmanager
def second_device() -> Iterator[None]:
    """Context manager in which the meta device is the second device, and computes."""
    with _Devices():
        yield


class _MoveArguments(ModelHook):
    """Moves a module's arguments to its device, as accelerate's own hook does."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        return send_to_device(args, self._device), send_to_device(kwargs, self._device)


def divided(model: nn.Module, first: int) -> nn.Module:
    """The model with its layers from number `first` on, its last norm and its head on the second device."""
    upper = [*model.model.layers[first:], model.model.norm, model.lm_head]
    for module in model.modules():
        device = SECOND if any(module in set(each.modules()) for each in upper) else FIRST
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
    for module in [*model.model.layers, *upper[-2:]]:
        add_hook_to_module(module, _MoveArguments(next(module.parameters()).device))
    return model


def numbers_of(tensor: Tensor) -> Tensor:
    """A tensor of either device as a CPU tensor; works outside `second_device()`, too."""
    return getattr(tensor, "held", tensor)
