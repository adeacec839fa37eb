"""Saving: a Hugging Face checkpoint, whole or not at all."""

from pathlib import Path

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gradprune.checkpoint.atomic import atomic_directory


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | Path,
    *,
    overwrite: bool = False,
) -> None:
    """Write a Hugging Face checkpoint: weights as safetensors, configuration, tokenizer, modelling file if needed.

    The folder appears whole or not at all, and has the same bytes every time.

    Raises:
        CheckpointError: it exists and `overwrite` is False.
    """
    with atomic_directory(Path(directory), overwrite=overwrite, argument="directory") as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
