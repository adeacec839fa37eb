"""Tokens per second; the models under comparison take turns."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from gradprune.errors import ConfigError
from gradprune.models.modes import evaluation_mode
from gradprune.models.sizes import vocabulary_of

_WARM_UP = 2


@dataclass(frozen=True)
class Throughput:
    """Tokens per second: the 20th percentile (slow), the median and the 80th percentile (fast) of the repeats."""

    p20: float
    p50: float
    p80: float


@torch.inference_mode()
def throughput(
    models: Mapping[str, PreTrainedModel], *, seq_len: int, seed: int, batch_size: int = 4, repeats: int = 15
) -> dict[str, Throughput]:
    """Tokens per second of forward passes without a KV cache; models alternate, so machine load affects all equally.

    Args:
        models: by name, at least one.
        seq_len, batch_size: shape of the random input.
        seed: of the random input.
        repeats: timed passes of each model, after two untimed ones.

    Raises:
        ConfigError: `repeats` is less than 1.
    """
    ids = _random_ids(models, batch_size, seq_len, seed)
    return _alternate(
        models, lambda model: model(input_ids=ids.to(model.device), use_cache=False), ids.numel(), repeats
    )


@torch.inference_mode()
def decode_throughput(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt_len: int,
    new_tokens: int,
    seed: int,
    batch_size: int = 1,
    repeats: int = 5,
) -> dict[str, Throughput]:
    """New tokens per second of greedy generation with a KV cache, prefill included; the models alternate.

    Args:
        models: by name, at least one.
        prompt_len, batch_size: shape of the random prompts.
        new_tokens: generated per prompt, ignoring end-of-text; prompt and new tokens must fit the context.
        seed: of the random prompts.
        repeats: timed generations of each model, after two untimed ones.

    Raises:
        ConfigError: `repeats` is less than 1.
    """
    ids = _random_ids(models, batch_size, prompt_len, seed)
    options = GenerationConfig(do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0)

    def generate(model: PreTrainedModel) -> None:
        prompt = ids.to(model.device)
        # mypy cannot resolve the mixin that defines `generate`, and takes it for a submodule or a tensor.
        model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=options, use_cache=True)  # type: ignore[operator]

    return _alternate(models, generate, batch_size * new_tokens, repeats)


def _random_ids(models: Mapping[str, PreTrainedModel], samples: int, tokens: int, seed: int) -> Tensor:
    """Random ids [samples, tokens] int64, within every model's vocabulary."""
    vocabulary = min(vocabulary_of(model) for model in models.values())
    return torch.randint(vocabulary, (samples, tokens), generator=torch.Generator().manual_seed(seed))


def _alternate(
    models: Mapping[str, PreTrainedModel], run: Callable[[PreTrainedModel], object], tokens: int, repeats: int
) -> dict[str, Throughput]:
    """Tokens per second of each model; one call of `run` processes `tokens`. Models take turns within each repeat."""
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
