"""The choice among a kernel's configurations, by a micro-benchmark on the GPU at hand."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
import triton
from torch import Tensor

Config = TypeVar("Config")

_WARMUP, _RUNS = 3, 10
_chosen: dict[Hashable, object] = {}


def fastest(configs: Sequence[Config], launch: Callable[[Config], object], tensor: Tensor, *key: Hashable) -> Config:
    """The configuration whose launch is fastest on the device of `tensor`; on a CPU, the first.

    Measured once for each GPU model, Triton version, dtype of `tensor` and `key`, and remembered. All configurations
    must give the same bits, because a choice by time must not change a result. One that needs more resources than the
    device has is not chosen; the default has to fit.

    Args:
        configs: at least one, the default first.
        launch: launches the kernel with a configuration.
        tensor: one of the kernel's inputs, for its device and dtype.
        key: whatever else the choice depends on, such as sizes.
    """
    if len(configs) == 1 or not tensor.is_cuda:
        return configs[0]
    known = (configs[0], torch.cuda.get_device_name(tensor.device), triton.__version__, tensor.dtype, *key)
    if known not in _chosen:
        fitting = [configs[0], *(config for config in configs[1:] if _fits(launch, config))]
        _chosen[known] = min(fitting, key=lambda config: _milliseconds(lambda: launch(config)))
    return _chosen[known]  # type: ignore[return-value]


def _fits(launch: Callable[[Config], object], config: Config) -> bool:
    """Whether the device has the shared memory and the registers that a launch with `config` needs."""
    try:
        launch(config)
    except triton.OutOfResources:
        return False
    return True


def _milliseconds(launch: Callable[[], object]) -> float:
    """Mean milliseconds of a launch on the device."""
    for _ in range(_WARMUP):
        launch()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(_RUNS):
        launch()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / _RUNS
