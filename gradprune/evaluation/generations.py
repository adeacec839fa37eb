"""Greedy continuations of a few prompts: what a dense and a pruned model write, to be read side by side."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradprune.errors import EvaluationError, one_line
from gradprune.models.modes import evaluation_mode, plain_generation

# The number of prompts drawn from the evaluation text, the tokens of each, and the most tokens written after each.
_PROMPTS, _LENGTH, _NEW = 3, 24, 32


def read_prompts(path: str | Path) -> list[str]:
    """Read the prompts of a text file: its lines that are not empty.

    Raises:
        EvaluationError: the file cannot be read, or all its lines are empty.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise EvaluationError(f"prompts: '{path}' cannot be read: {one_line(error)}") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise EvaluationError(f"prompts: '{path}' has no line with a prompt")
    return found


def drawn_prompts(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> list[str]:
    """Cut up to three evenly spaced prompts out of a text, made of whole words if the text has spaces.

    tokens: [tokens] int64, the text.
    """
    starts = sorted({number * len(tokens) // _PROMPTS for number in range(_PROMPTS)})
    texts = [str(tokenizer.decode(tokens[start : start + _LENGTH], skip_special_tokens=True)) for start in starts]
    return [_whole_words(text) for text in texts if text.strip()]


def _whole_words(text: str) -> str:
    """Strip what precedes the first and follows the last space; return the text itself if nothing lies between."""
    between = re.search(r"\s(\S.*\S)\s", text, flags=re.DOTALL)
    return between[1] if between else text


@torch.inference_mode()
def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> tuple[str, ...]:
    """Write at most 32 tokens after each prompt, greedily: always the likeliest next token.

    The checkpoint's generation settings are ignored, except for the tokens that end a text. A prompt too long for the
    model's context is shortened to its last tokens.
    """
    context = int(getattr(model.config, "max_position_embeddings", None) or _LENGTH + _NEW)
    new = max(1, min(_NEW, context // 2))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    end: Any = getattr(model.generation_config, "eos_token_id", None)
    texts = []
    with evaluation_mode(model), plain_generation(model):
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()[:, -max(1, context - new) :]
            if not ids.numel():  # a prompt of characters that the tokenizer leaves out
                ids = torch.full((1, 1), pad if pad is not None else 0)
            ids = ids.to(model.device)
            found = model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=end,
                pad_token_id=pad,
            )  # fmt: skip
            texts.append(str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)))
    return tuple(texts)
