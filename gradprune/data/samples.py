"""A run's data: calibration samples, held-out samples, search samples and evaluation text."""

from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradprune.config import PruneConfig
from gradprune.data.own_text import own_samples
from gradprune.data.sources import load_tokens
from gradprune.data.windows import check_evaluation, overlap_of, sample_windows, split_held_out, spread
from gradprune.errors import CalibrationError
from gradprune.models.sizes import vocabulary_of
from gradprune.progress import QUIET, progress
from gradprune.ranks import ALONE, Ranks

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
# The fewest search samples; the standard error of a mean needs two.
_FEWEST_SEARCHED = 2


@dataclass(frozen=True)
class Samples:
    """The token ids, int64, that a run uses. Calibration, held-out and search samples never overlap.

    calibration: [num_samples, seq_len]. held_out: [at most held_out_samples, seq_len], on which the repair chooses its
        settings. searched: [at most search_samples, seq_len], on which the search compares candidates. Each is empty
        if nothing is run on it. The share `own_text` of the calibration and of the held-out samples is written by the
        model itself and evenly spread among the others.
    evaluation: [tokens], for perplexity.
    overlap: estimated fraction of the evaluation tokens that occur in the calibration text.
    """

    calibration: Tensor
    held_out: Tensor
    searched: Tensor
    evaluation: Tensor
    overlap: float = 0.0


def draw_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruneConfig,
    calibration: Tensor | None = None,
    evaluation: Tensor | None = None,
    *,
    calibrated: int = 0,
    console: Console = QUIET,
    ranks: Ranks = ALONE,
) -> Samples:
    """Draw the samples of a run.

    Args:
        model, tokenizer: the model and its tokenizer, if it has one.
        config: the options.
        calibration, evaluation: [tokens] int64, or a smaller signed integer type or uint8, which is converted; None
            reads the dataset that `config` names, see `calibration_and_evaluation`.
        calibrated: number of windows, drawn in the same way, that an earlier run calibrated on. They are used neither
            as held-out nor as search samples.
        console: where progress is shown while the model writes samples.
        ranks: the processes that divide the writing.

    Raises:
        CalibrationError: text is missing or too short, or has ids outside the model's vocabulary; or the model cannot
            write samples, see `own_samples`.
    """
    evaluated = "eval_dataset" if evaluation is None else "evaluation"
    calibration, evaluation = (
        given if given is None else _checked(name, given, vocabulary_of(model))
        for name, given in (("calibration", calibration), ("evaluation", evaluation))
    )
    calibration, evaluation = calibration_and_evaluation(
        tokenizer, config, calibration, evaluation, vocabulary_of(model)
    )
    check_evaluation(evaluation, config.seq_len, evaluated)
    own = config.samples_written
    drawn, held_out = (count - written for count, written in zip(config.samples_drawn, own, strict=True))
    sizes = _sizes_of_text(len(calibration) // config.seq_len, config, drawn, held_out, calibrated)
    windows = calibration.new_empty(0, config.seq_len)
    if sum(sizes):
        windows = sample_windows(calibration, num_samples=sum(sizes), seq_len=config.seq_len, seed=config.seed)
    calibrated_on, _, chosen_on, compared_on = windows.split(sizes)
    if sum(own):
        with progress(console, "Writing", sum(own), "samples") as advance:
            written = own_samples(
                model,
                sum(own),
                config.seq_len,
                batch_size=config.batch_size,
                seed=config.seed,
                ranks=ranks,
                advance=advance,
            )
        calibrated_on, chosen_on = map(spread, (calibrated_on, chosen_on), written.split(own))
    return Samples(calibrated_on, chosen_on, compared_on, evaluation, overlap_of(evaluation, calibration))


def _sizes_of_text(available: int, config: PruneConfig, drawn: int, held_out: int, calibrated: int) -> list[int]:
    """Divide the windows of the text, in drawing order, among their uses.

    Args:
        available: number of windows of the text.
        config: the options.
        drawn, held_out: number of windows wanted as calibration and held-out samples.
        calibrated: number of windows, the first ones, that an earlier run calibrated on.

    Returns:
        Four numbers of windows: to calibrate on, to skip because the earlier run calibrated on them, to hold out, and
        to search on.

    Raises:
        CalibrationError: the search is left fewer than two windows.
    """
    passed = max(0, min(calibrated, available) - drawn)
    # Held-out and search samples come from the windows that calibration leaves.
    spare = max(0, available - drawn - passed)
    searches = config.importance_method == "auto"
    if searches and spare < _FEWEST_SEARCHED:
        raise CalibrationError(
            f"num_samples: {config.num_samples} samples leave no text to search on; give more text, or fewer samples"
        )
    # If the text is too short for both, the search gets two thirds of the rest.
    held_out = min(held_out, spare // 3 if searches else spare)
    return [drawn, passed, held_out, min(config.search_samples, spare - held_out) if searches else 0]


def _checked(argument: str, tokens: Tensor, vocab_size: int) -> Tensor:
    """Check that `tokens` are one stream of ids within the vocabulary and return them as int64, or raise."""
    if not isinstance(tokens, Tensor):
        raise CalibrationError(f"{argument}: is a {type(tokens).__name__}; a torch tensor, [tokens] int64, is needed")
    if tokens.ndim != 1 or tokens.dtype not in _INTEGERS:
        raise CalibrationError(
            f"{argument}: has shape {tuple(tokens.shape)} and dtype {tokens.dtype}; [tokens] int64 is needed"
        )
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise CalibrationError(
            f"{argument}: has ids from {int(tokens.min())} to {int(tokens.max())}; those of the model go from 0 to "
            f"{vocab_size - 1}"
        )
    return tokens.long().cpu()


def calibration_and_evaluation(
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruneConfig,
    calibration: Tensor | None,
    evaluation: Tensor | None,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """Return calibration and evaluation tokens, [tokens] int64 each, as given or read from the datasets of `config`.

    If only calibration text is given, as tokens or as a dataset, its end is held out for evaluation. If no text is
    given, both come from the embedded text.

    Raises:
        CalibrationError: a dataset cannot be read, or is too short to hold out its end.
    """
    held_out_in_file = evaluation is None and config.eval_dataset is None
    if evaluation is None and (config.eval_dataset is not None or (calibration is None and config.dataset is None)):
        evaluation = load_tokens(
            config.eval_dataset, tokenizer, split="evaluation", vocab_size=vocab_size, argument="eval_dataset"
        )
        held_out_in_file = False
    if calibration is None:
        calibration = load_tokens(config.dataset, tokenizer, vocab_size=vocab_size)
    if held_out_in_file or evaluation is None:
        return split_held_out(calibration, config.seq_len)
    return calibration, evaluation
