"""Perplexity as papers measure it: named, so that their figures and ours can be compared."""

from typing import Literal, get_args

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradprune.data.sources import load_tokens
from gradprune.data.tokenize import begins_with_bos
from gradprune.data.windows import check_context
from gradprune.errors import ConfigError
from gradprune.evaluation.perplexity import Perplexity, perplexity
from gradprune.progress import QUIET

Protocol = Literal["wikitext2-128", "wikitext2-2048"]

# Tokens per window: as LLM-Pruner (Ma et al. 2023), and as SparseGPT (Frantar and Alistarh 2023) and Wanda (Sun et al.
# 2024) have it.
_WINDOW: dict[str, int] = {"wikitext2-128": 128, "wikitext2-2048": 2048}


def protocol_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    protocol: Protocol | str,
    *,
    dataset: str | None = None,
    batch_size: int = 8,
    console: Console = QUIET,
) -> Perplexity:
    """Perplexity by a protocol of the literature.

    WikiText-2's raw test split as one text, its rows joined by blank lines, after the tokenizer's beginning-of-text
    token if it adds one; cut into whole windows that do not overlap; the rest is dropped.

    Args:
        model, tokenizer: a causal LM and its tokenizer.
        protocol: names the windows' length.
        dataset: a file with that text, where the hub cannot be reached; the name wikitext2 by default.
        batch_size, console: as for `perplexity`.

    Raises:
        ConfigError: the protocol is unknown.
        CalibrationError: the text is missing or too short, or a window is longer than the model's context.
    """
    if protocol not in _WINDOW:
        raise ConfigError(f"protocol: '{protocol}' is unknown; choose one of {', '.join(get_args(Protocol))}")
    window = _WINDOW[protocol]
    check_context(model.config, window)
    tokens = load_tokens(dataset or "wikitext2", tokenizer, split="evaluation", vocab_size=int(model.config.vocab_size))
    if tokenizer is not None and begins_with_bos(tokenizer):
        tokens = torch.cat([torch.tensor([tokenizer.bos_token_id]), tokens])
    return perplexity(
        model, tokens, seq_len=window, batch_size=batch_size, max_windows=max(1, len(tokens) // window), console=console
    )
