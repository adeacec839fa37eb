"""Perplexity by named protocols of the literature, so that gradprune's figures compare with published ones."""

from typing import Literal, get_args

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradprune.data.agreement import check_same_inputs
from gradprune.data.sources import load_tokens
from gradprune.data.tokenize import begins_with_bos
from gradprune.data.windows import check_context
from gradprune.errors import CalibrationError, ConfigError
from gradprune.evaluation.perplexity import Perplexity, perplexity
from gradprune.models.sizes import vocabulary_of
from gradprune.progress import QUIET
from gradprune.ranks import ALONE, Ranks

Protocol = Literal["wikitext2-128", "wikitext2-2048"]

# Tokens per window: 128 as in LLM-Pruner (Ma et al. 2023); 2048 as in SparseGPT (Frantar and Alistarh 2023) and Wanda
# (Sun et al. 2024).
_WINDOW: dict[str, int] = {"wikitext2-128": 128, "wikitext2-2048": 2048}


def protocol_window(protocol: Protocol | str) -> int:
    """Return the tokens per window of a protocol.

    Raises:
        ConfigError: the protocol is unknown.
    """
    if protocol not in _WINDOW:
        raise ConfigError(f"protocol: '{protocol}' is unknown; choose one of {', '.join(get_args(Protocol))}")
    return _WINDOW[protocol]


def protocol_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    protocol: Protocol | str,
    *,
    dataset: str | None = None,
    batch_size: int = 8,
    max_windows: int | None = None,
    console: Console = QUIET,
    ranks: Ranks = ALONE,
) -> Perplexity:
    """Measure perplexity by a protocol of the literature.

    The text is WikiText-2's raw test split, its rows joined by blank lines, preceded by the beginning-of-text token if
    the tokenizer adds one. It is cut into non-overlapping windows; an incomplete last window is dropped.

    Args:
        model, tokenizer: a causal LM and its tokenizer.
        protocol: name of the protocol; it ends in the window length.
        dataset: a local file with that text, for when the hub cannot be reached; None loads `wikitext2`.
        max_windows: measure on at most this many windows, which departs from the protocol; None measures on all.
        batch_size, console, ranks: see `perplexity`.

    Raises:
        ConfigError: the protocol is unknown, or the ranks differ in model or text.
        CalibrationError: the text is missing or too short, or a window is longer than the model's context.
    """
    window = protocol_window(protocol)
    try:
        check_context(model.config, window)
    except CalibrationError as error:
        raise CalibrationError(
            f"protocol: '{protocol}' does not fit: {str(error).partition(': ')[2]}; choose one with shorter windows, "
            "or none"
        ) from error
    tokens = load_tokens(dataset or "wikitext2", tokenizer, split="evaluation", vocab_size=vocabulary_of(model))
    if tokenizer is not None and begins_with_bos(tokenizer):
        tokens = torch.cat([torch.tensor([tokenizer.bos_token_id]), tokens])
    check_same_inputs(ranks, model, {"dataset": (tokens,)}, argument="model")
    whole = max(1, len(tokens) // window)
    return perplexity(
        model,
        tokens,
        seq_len=window,
        batch_size=batch_size,
        max_windows=whole if max_windows is None else min(max_windows, whole),
        argument="dataset",
        console=console,
        ranks=ranks,
    )
