"""Perplexity of a causal language model."""

import itertools
import math
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from gradprune.data.windows import batches, check_evaluation
from gradprune.errors import CalibrationError, NonFiniteError
from gradprune.models.modes import evaluation_mode
from gradprune.models.passes import losses
from gradprune.progress import QUIET, progress
from gradprune.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity: exp of the mean negative log-likelihood.

    value: the perplexity; inf if it is too large for a float. nll: mean negative log-likelihood in nats, finite.
    tokens: number of predicted tokens. windows: number of windows.
    """

    value: float
    nll: float
    tokens: int
    windows: int


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    seq_len: int,
    batch_size: int,
    max_windows: int | None = None,
    argument: str = "eval_dataset",
    console: Console = QUIET,
    ranks: Ranks = ALONE,
) -> Perplexity:
    """Measure exp(total negative log-likelihood / predicted tokens) over consecutive, non-overlapping windows.

    If at least two tokens remain after the last whole window, they form a shorter one. Accumulates in fp64.

    Args:
        model: a causal LM; measured in evaluation mode, and left in the mode it was in.
        tokens: [tokens] int64, held-out text.
        seq_len: tokens per window, of which all but the first are predicted.
        batch_size: windows per forward pass; affects only memory and speed.
        max_windows: measure at most this many whole windows, spread evenly over the text; None measures all of it.
        argument: name of the option that `tokens` come from, for error messages.
        console: where progress is shown.
        ranks: the processes that share the work by dividing the windows; the result has the same bits as without them.

    Raises:
        CalibrationError: the text is shorter than one window, `seq_len` is below 2, or `max_windows` is below 1.
        NonFiniteError: a window's loss is NaN or infinite.
    """
    numbers, parts = _windows(tokens, seq_len, batch_size, max_windows, argument)
    numbered = iter(numbers)
    own = ranks.share([(part, list(itertools.islice(numbered, len(part)))) for part in parts])
    nll: list[Tensor] = []
    shown = progress(console, "Measuring perplexity", sum(len(n) for _, n in own), "windows")
    with shown as advance, evaluation_mode(model):
        for (part, windows), found in zip(own, losses(model, [part for part, _ in own]), strict=True):
            nll.append(torch.tensor(_finite(found, windows), dtype=torch.float64) * (part.shape[1] - 1))
            advance(len(part))
    predicted = sum(part.shape[0] * (part.shape[1] - 1) for part in parts)
    mean = math.fsum(torch.cat(ranks.joined(nll)).tolist()) / predicted
    return Perplexity(_exp(mean), mean, predicted, len(numbers))


def _windows(
    tokens: Tensor, seq_len: int, batch_size: int, max_windows: int | None, argument: str
) -> tuple[list[int], list[Tensor]]:
    """Return the indices of the windows to measure, and the windows in batches; a shorter last window comes last."""
    for name, value, least in (("seq_len", seq_len, 2), ("max_windows", max_windows, 1)):
        if value is not None and value < least:
            raise CalibrationError(f"{name}: {value} is not at least {least}")
    check_evaluation(tokens, seq_len, argument)
    count = len(tokens) // seq_len
    whole = tokens[: count * seq_len].reshape(count, seq_len)
    rest = tokens[count * seq_len :]
    # A single remaining token predicts nothing.
    if max_windows is None or max_windows > count:
        with_rest = len(rest) >= 2
        return list(range(count + with_rest)), [*batches(whole, batch_size), *([rest[None]] if with_rest else [])]
    numbers = [window * count // max_windows for window in range(max_windows)]
    return numbers, list(batches(whole[numbers], batch_size))


def _finite(found: Tensor, windows: list[int]) -> list[float]:
    """Copy losses [N] of the first N of `windows` (their indices) to the host; raise if one is not finite."""
    values: list[float] = found.tolist()
    for window, value in zip(windows, values, strict=False):
        if not math.isfinite(value):
            raise NonFiniteError(f"loss of evaluation window {window} is {value}")
    return values


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
