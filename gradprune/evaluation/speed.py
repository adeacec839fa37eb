"""Throughput in tokens per second; models that are compared take turns, so that machine load affects all equally."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradprune.errors import ConfigError
from gradprune.models.modes import evaluation_mode
from gradprune.models.sizes import vocabulary_of

_WARM_UP = 2


@dataclass(frozen=True)
class Throughput:
    """Tokens per second: the 20th percentile (slow), the median and the 80th percentile (fast) over the repeats."""

    p20: float
    p50: float
    p80: float


@torch.inference_mode()
def throughput(
    models: Mapping[str, PreTrainedModel], *, seq_len: int, seed: int, batch_size: int = 4, repeats: int = 15
) -> dict[str, Throughput]:
    """Measure tokens per second of forward passes without a KV cache; the models take turns.

    Args:
        models: the models by name, at least one.
        seq_len, batch_size: shape of the random input.
        seed: seed of the random input.
        repeats: number of timed passes of each model; two untimed ones come first.

    Raises:
        ConfigError: `repeats` is less than 1.
    """
    ids = random_ids(models, batch_size, seq_len, seed)
    return alternate(models, lambda model: model(input_ids=ids.to(model.device), use_cache=False), ids.numel(), repeats)


def random_ids(models: Mapping[str, PreTrainedModel], samples: int, tokens: int, seed: int) -> Tensor:
    """Draw random token ids [samples, tokens] int64 that are in every model's vocabulary."""
    vocabulary = min(vocabulary_of(model) for model in models.values())
    return torch.randint(vocabulary, (samples, tokens), generator=torch.Generator().manual_seed(seed))


def alternate(
    models: Mapping[str, PreTrainedModel], run: Callable[[PreTrainedModel], object], tokens: int, repeats: int
) -> dict[str, Throughput]:
    """Measure each model's tokens per second, where one call of `run` processes `tokens` tokens.

    The models take turns within each repeat. Two untimed repeats come first.

    Raises:
        ConfigError: `repeats` is less than 1.
    """
    if repeats < 1:
        raise ConfigError(f"repeats: {repeats} is not at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with evaluation_mode(*models.values()):
        for repeat in range(_WARM_UP + repeats):
            for name, model in models.items():
                elapsed = _seconds(run, model)
                if repeat >= _WARM_UP:
                    seconds[name].append(elapsed)
    rates = {name: tokens / np.array(times) for name, times in seconds.items()}
    return {name: Throughput(*(float(p) for p in np.percentile(rate, (20, 50, 80)))) for name, rate in rates.items()}


def _seconds(run: Callable[[PreTrainedModel], object], model: PreTrainedModel) -> float:
    _synchronize(model.device)
    start = time.perf_counter()
    run(model)
    _synchronize(model.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
