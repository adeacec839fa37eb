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

# Prompts that are drawn from the evaluation text, their tokens, and the tokens that follow.
_PROMPTS, _LENGTH, _NEW = 3, 24, 32


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        EvaluationError: the file cannot be read, or has none.
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
    """Pieces of a text, evenly spaced, of whole words where it has spaces.

    tokens: [tokens] int64.
    """
    starts = sorted({number * len(tokens) // _PROMPTS for number in range(_PROMPTS)})
    texts = [str(tokenizer.decode(tokens[start : start + _LENGTH], skip_special_tokens=True)) for start in starts]
    return [_whole_words(text) for text in texts if text.strip()]


def _whole_words(text: str) -> str:
    """The text without what is before its first and after its last space, if there is something between them."""
    between = re.search(r"\s(\S.*\S)\s", text, flags=re.DOTALL)
    return between[1] if between else text


@torch.inference_mode()
def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> tuple[str, ...]:
    """What the model writes after each prompt, at most 32 tokens, always the likeliest next one.

    Nothing else that the checkpoint recommends for generation holds, but where a text ends. The end of a prompt that
    leaves no room in the model's context is taken.
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
