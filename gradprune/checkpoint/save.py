"""Saving: a Hugging Face checkpoint, whole or not at all."""

import shutil
from pathlib import Path

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import gradprune.models
from gradprune.checkpoint.atomic import atomic_directory, is_checkpoint
from gradprune.checkpoint.shards import save_streamed
from gradprune.models.modeling_gradprune import per_layer_overrides
from gradprune.models.residency import residency_of

# Never imported here, where MLX need not be installed.
MLX_FILE = "modeling_mlx.py"
MLX_SOURCE = Path(gradprune.models.__file__).with_name(MLX_FILE)
MLX_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
"""Model types of which mlx-lm has what the file builds on."""


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | Path,
    *,
    overwrite: bool = False,
) -> None:
    """Write a Hugging Face checkpoint: weights as safetensors, configuration, tokenizer, modelling files
    for transformers and MLX if needed.

    The folder appears whole or not at all, and has the same bytes every time.

    Raises:
        CheckpointError: it exists and `overwrite` is False, or it is no checkpoint; or it cannot be written.
    """
    with atomic_directory(Path(directory), overwrite=overwrite, argument="directory", replaces=is_checkpoint) as folder:
        write_checkpoint(model, tokenizer, folder)


def write_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write the same into `folder`, which itself will appear whole or not at all."""
    model.config.__dict__.pop("model_file", None)
    in_mlx = model.config.model_type in MLX_TYPES and bool(per_layer_overrides(model.config))
    if in_mlx:
        # The key by which mlx-lm finds it.
        model.config.model_file = MLX_FILE
    residency = residency_of(model)
    if residency is None:
        model.save_pretrained(folder)
    else:
        save_streamed(model, residency, folder)
    if in_mlx:
        shutil.copyfile(MLX_SOURCE, folder / MLX_FILE)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
