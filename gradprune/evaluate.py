"""What a model is worth and what it costs: perplexity, parameters, bytes, tokens per second."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from gradprune.calibration import batches
from gradprune.errors import CalibrationError, NonFiniteError
from gradprune.loss import sample_losses
from gradprune.progress import progress


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, over `tokens` predicted tokens in `windows` windows.

    value: the perplexity. nll: nats a token.
    """

    value: float
    nll: float
    tokens: int
    windows: int


@dataclass(frozen=True)
class Throughput:
    """Tokens per second of forward passes: median and 20th and 80th percentiles of the repeats."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class ModelSize:
    """parameters: tied ones counted once. bytes: of their tensors."""

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
    """Perplexity over consecutive, non-overlapping windows; a rest shorter than `seq_len` is left out.

    Args:
        model: a causal LM, in evaluation mode.
        tokens: [tokens] int64, held-out text.
        seq_len: tokens a window, of which seq_len - 1 are predicted.
        batch_size: windows a forward pass; changes nothing but memory and speed.
        max_windows: measure only so many, spread evenly over the text; None measures all.
        console: where progress is shown.

    Raises:
        CalibrationError: not one whole window of text.
        NonFiniteError: a window's loss is NaN or infinite.
    """
    count = len(tokens) // seq_len
    if count == 0:
        raise CalibrationError(f"eval_dataset: {len(tokens)} held-out tokens are less than one window of {seq_len}")
    windows = tokens[: count * seq_len].view(count, seq_len)
    if max_windows is not None and max_windows < count:
        windows = windows[torch.arange(max_windows) * count // max_windows]
    total = 0.0
    done = 0
    with progress(console or Console(quiet=True), "Measuring perplexity", len(windows), "windows") as advance:
        for batch in batches(windows, batch_size):
            losses = sample_losses(model, batch.to(model.device)).double()
            if not losses.isfinite().all():
                bad = int((~losses.isfinite()).nonzero()[0])
                raise NonFiniteError(f"loss of evaluation window {done + bad} is {losses[bad].item()}")
            total += losses.sum().item()
            done += len(batch)
            advance(len(batch))
    nll = total / len(windows)
    return Perplexity(math.exp(nll), nll, len(windows) * (seq_len - 1), len(windows))


@torch.inference_mode()
def throughput(
    models: Mapping[str, PreTrainedModel], *, seq_len: int, seed: int, batch_size: int = 4, repeats: int = 15
) -> dict[str, Throughput]:
    """Tokens per second of forward passes without a cache, the models alternating so that both see the same machine.

    Args:
        models: by name; all on one device.
        seq_len, batch_size: shape of the random input.
        seed: of the random input.
        repeats: timed passes of each model, after two untimed ones.
    """
    vocabulary = min(model.config.vocab_size for model in models.values())
    ids = torch.randint(vocabulary, (batch_size, seq_len), generator=torch.Generator().manual_seed(seed))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 2):
        for name, model in models.items():
            elapsed = _time_forward(model, ids.to(model.device))
            if repeat >= 2:
                seconds[name].append(elapsed)
    rates = {name: ids.numel() / np.array(times) for name, times in seconds.items()}
    return {name: Throughput(*(float(p) for p in np.percentile(rate, (20, 50, 80)))) for name, rate in rates.items()}


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


def _time_forward(model: PreTrainedModel, ids: Tensor) -> float:
    _synchronize(ids)
    start = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    _synchronize(ids)
    return time.perf_counter() - start


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
