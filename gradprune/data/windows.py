"""Cut a stream of token ids into windows, samples and batches."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from gradprune.errors import CalibrationError
from gradprune.models.modeling_gradprune import text_config

HELD_OUT = 0.1
"""The fraction of a stream's tokens, at its end, that is held out for evaluation."""

# The tokens of a piece that overlap is searched with, too many to match by chance, and about how many pieces are tried.
_PIECE_TOKENS, _PIECES = 64, 16


def split_held_out(tokens: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """Split a stream into calibration tokens and, at its end, held-out tokens.

    Args:
        tokens: [tokens] int64.
        seq_len: tokens per window; the held-out part has at least one window.

    Returns:
        calibration, evaluation: [tokens] int64 each, views of `tokens`.

    Raises:
        CalibrationError: `tokens` is too short for one window of each.
    """
    held_out = max(int(len(tokens) * HELD_OUT), seq_len)
    if len(tokens) < held_out + seq_len:
        raise CalibrationError(
            f"dataset: {len(tokens)} tokens are too few to calibrate and to hold out a window of {seq_len} tokens for "
            "perplexity; give more text, a smaller seq_len, or an eval_dataset"
        )
    return tokens[:-held_out], tokens[-held_out:]


def check_evaluation(tokens: Tensor, seq_len: int, argument: str) -> None:
    """Check that evaluation text, [tokens], has at least one window of `seq_len` tokens, or raise.

    Raises:
        CalibrationError: the text is too short; the message begins with `argument`, the option that it came from.
    """
    if len(tokens) < seq_len:
        raise CalibrationError(
            f"{argument}: {len(tokens)} held-out tokens are less than one window of {seq_len}; give more text, or a "
            "smaller seq_len"
        )


def sample_windows(tokens: Tensor, *, num_samples: int, seq_len: int, seed: int) -> Tensor:
    """Draw windows of consecutive tokens, without replacement and without overlap.

    Args:
        tokens: [tokens] int64.
        num_samples, seq_len: number of windows and tokens per window, at least 1 each.
        seed: the same seed draws the same windows.

    Returns:
        [num_samples, seq_len] int64.

    Raises:
        CalibrationError: the text is too short; the message says how much there is, how much is needed and how many
            windows fit.
    """
    for name, value in (("num_samples", num_samples), ("seq_len", seq_len)):
        if value < 1:
            raise CalibrationError(f"{name}: {value} is not at least 1")
    if not len(tokens):
        raise CalibrationError("dataset: it is empty, there is no token to draw samples from")
    available = len(tokens) // seq_len
    if available < num_samples:
        fits = f"num_samples can be {available} at most" if available else "not one fits"
        raise CalibrationError(
            f"num_samples: {num_samples} samples of {seq_len} tokens need {num_samples * seq_len:,} tokens, but the "
            f"dataset has {len(tokens):,}: {fits}; give more text, or fewer or shorter samples"
        )
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(len(tokens) - available * seq_len + 1, (), generator=generator))
    windows = tokens[offset : offset + available * seq_len].reshape(available, seq_len)
    return windows[torch.randperm(available, generator=generator)[:num_samples]]


def spread(first: Tensor, second: Tensor) -> Tensor:
    """Interleave [A, T] and [B, T] evenly into [A + B, T]; the rows of each keep their order."""
    places = [(torch.arange(len(each), dtype=torch.float64) + 0.5) / max(1, len(each)) for each in (first, second)]
    return torch.cat([first, second])[torch.cat(places).argsort(stable=True)]


def overlap_of(evaluation: Tensor, calibration: Tensor) -> float:
    """Estimate the fraction of `evaluation` that occurs in `calibration`, from pieces spread evenly over `evaluation`.

    Args:
        evaluation, calibration: [tokens] int64.
    """
    length = min(_PIECE_TOKENS, len(evaluation))
    if not length:
        return 0.0
    text = calibration.to(torch.int64).numpy().tobytes()
    starts = range(0, len(evaluation) - length + 1, max(1, (len(evaluation) - length) // _PIECES))
    found = sum(_occurs(evaluation[start : start + length].to(torch.int64).numpy().tobytes(), text) for start in starts)
    return found / len(starts)


def _occurs(piece: bytes, text: bytes) -> bool:
    """Whether `piece` occurs in `text` at a token boundary; both hold int64 ids."""
    position = text.find(piece)
    while position > 0 and position % 8:
        position = text.find(piece, position + 1)
    return position >= 0


def batches(windows: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Split windows [N, T] into consecutive batches [<= batch_size, T]; without windows, yield no batches."""
    # `split` would return one empty batch.
    if len(windows):
        yield from windows.split(batch_size)


def check_context(config: PreTrainedConfig, seq_len: int) -> None:
    """Check that sequences of `seq_len` tokens fit into the model's context, or raise.

    Raises:
        CalibrationError: `seq_len` exceeds the context; the message gives both.
    """
    longest = getattr(text_config(config), "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise CalibrationError(
            f"seq_len: {seq_len} is longer than the model's context of {longest} tokens (max_position_embeddings)"
        )
