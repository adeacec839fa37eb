"""What a model is worth and what it costs: perplexity, parameters, bytes, tokens per second."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from gradprune.calibration import batches
from gradprune.errors import CalibrationError, ConfigError, NonFiniteError
from gradprune.loss import sample_losses
from gradprune.progress import progress

_WARM_UP = 2


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, over `tokens` predicted tokens in `windows` windows.

    value: the perplexity, inf where it is too large for a float. nll: nats a token, finite.
    """

    value: float
    nll: float
    tokens: int
    windows: int


@dataclass(frozen=True)
class Throughput:
    """Tokens per second: the 20th percentile (slow), the median and the 80th percentile (fast) of the repeats."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class ModelSize:
    """parameters: tied ones counted once. bytes: of their tensors in memory; buffers are left out."""

    parameters: int
    bytes: int


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    seq_len: int,
    batch_size: int,
    max_windows: int | None = None,
    console: Console | None = None,
) -> Perplexity:
    """exp(total negative log-likelihood / predicted tokens), over consecutive windows that do not overlap.

    A rest of at least two tokens is a shorter window of its own. The total is accumulated in fp64.

    Args:
        model: a causal LM; measured in evaluation mode, and left in the mode it was in.
        tokens: [tokens] int64, held-out text.
        seq_len: tokens a window, of which all but the first are predicted.
        batch_size: windows a forward pass; changes nothing but memory and speed.
        max_windows: measure only so many whole windows, spread evenly over the text; None measures all, and the rest.
        console: where progress is shown.

    Raises:
        CalibrationError: not one whole window of text, or windows of fewer than two tokens, or none.
        NonFiniteError: a window's loss is NaN or infinite.
    """
    numbers, parts = _windows(tokens, seq_len, batch_size, max_windows)
    nll: list[float] = []
    predicted = 0
    shown = progress(console or Console(quiet=True), "Measuring perplexity", len(numbers), "windows")
    with shown as advance, _evaluation_mode(model):
        for part in parts:
            losses = _finite(sample_losses(model, part.to(model.device)), numbers[len(nll) :])
            nll += [loss * (part.shape[1] - 1) for loss in losses]
            predicted += part.shape[0] * (part.shape[1] - 1)
            advance(len(part))
    mean = math.fsum(nll) / predicted
    return Perplexity(_exp(mean), mean, predicted, len(numbers))


@torch.inference_mode()
def throughput(
    models: Mapping[str, PreTrainedModel], *, seq_len: int, seed: int, batch_size: int = 4, repeats: int = 15
) -> dict[str, Throughput]:
    """Tokens per second of forward passes without a cache, the models alternating so that both see the same machine.

    Args:
        models: by name, one at least.
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
    """New tokens per second of greedy generation with a KV cache, reading the prompt included; the models alternate.

    Args:
        models: by name, one at least.
        prompt_len, batch_size: shape of the random prompts.
        new_tokens: generated after each prompt, however likely its end; the context holds both.
        seed: of the random prompts.
        repeats: timed generations of each model, after two untimed ones.

    Raises:
        ConfigError: `repeats` is less than 1.
    """
    ids = _random_ids(models, batch_size, prompt_len, seed)
    options = GenerationConfig(do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0)

    def generate(model: PreTrainedModel) -> None:
        prompt = ids.to(model.device)
        # mypy takes an attribute of a mixin that it cannot follow for a submodule or a tensor.
        model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=options, use_cache=True)  # type: ignore[operator]

    return _alternate(models, generate, batch_size * new_tokens, repeats)


def model_size(model: PreTrainedModel) -> ModelSize:
    """Parameters and bytes of a model's unique tensors."""
    parameters = list(model.parameters())
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    )


def weight_bytes_on_disk(checkpoint: str | Path) -> int | None:
    """Bytes of a checkpoint folder's safetensors files; None where there are none, e.g. for a hub id."""
    files = list(Path(checkpoint).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else None


def _windows(tokens: Tensor, seq_len: int, batch_size: int, max_windows: int | None) -> tuple[list[int], list[Tensor]]:
    """Numbers of the windows to measure, and the windows in batches; the rest, if measured, is the last of both."""
    for name, value, least in (("seq_len", seq_len, 2), ("max_windows", max_windows, 1)):
        if value is not None and value < least:
            raise CalibrationError(f"{name}: {value} is not at least {least}")
    count = len(tokens) // seq_len
    if count == 0:
        raise CalibrationError(f"eval_dataset: {len(tokens)} held-out tokens are less than one window of {seq_len}")
    whole = tokens[: count * seq_len].reshape(count, seq_len)
    rest = tokens[count * seq_len :]
    # A rest of one token predicts nothing.
    if max_windows is None or max_windows > count:
        with_rest = len(rest) >= 2
        return list(range(count + with_rest)), [*batches(whole, batch_size), *([rest[None]] if with_rest else [])]
    numbers = [window * count // max_windows for window in range(max_windows)]
    return numbers, list(batches(whole[numbers], batch_size))


def _finite(losses: Tensor, windows: list[int]) -> list[float]:
    """The losses [N] of windows of these numbers (the first N of them), on the host."""
    values: list[float] = losses.tolist()
    for window, value in zip(windows, values, strict=False):
        if not math.isfinite(value):
            raise NonFiniteError(f"loss of evaluation window {window} is {value}")
    return values


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


@contextmanager
def _evaluation_mode(*models: PreTrainedModel) -> Iterator[None]:
    """Without dropout; every module is in its own mode again afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _random_ids(models: Mapping[str, PreTrainedModel], samples: int, tokens: int, seed: int) -> Tensor:
    """[samples, tokens] int64, ids that every model has."""
    vocabulary = min(model.config.vocab_size for model in models.values())
    return torch.randint(vocabulary, (samples, tokens), generator=torch.Generator().manual_seed(seed))


def _alternate(
    models: Mapping[str, PreTrainedModel], run: Callable[[PreTrainedModel], object], tokens: int, repeats: int
) -> dict[str, Throughput]:
    """Rates of a run of so many tokens, the models taking turns within each repeat."""
    if repeats < 1:
        raise ConfigError(f"repeats: {repeats} is not at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with _evaluation_mode(*models.values()):
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
