"""Saving: a Hugging Face checkpoint, whole or not at all."""

from pathlib import Path

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gradprune.checkpoint.atomic import atomic_directory, is_checkpoint


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
        CheckpointError: it exists and `overwrite` is False, or it is no checkpoint; or it cannot be written.
    """
    with atomic_directory(Path(directory), overwrite=overwrite, argument="directory", replaces=is_checkpoint) as folder:
        write_checkpoint(model, tokenizer, folder)


def write_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write the same into `folder`, which itself will appear whole or not at all."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
