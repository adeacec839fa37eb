"""Save a Hugging Face checkpoint so that it appears completely or not at all."""

import shutil
from pathlib import Path

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

import gradprune.models
from gradprune.checkpoint.atomic import atomic_directory, is_checkpoint
from gradprune.checkpoint.shards import save_streamed
from gradprune.config import OPTIONS, bytes_of
from gradprune.hub import hub_fault
from gradprune.models.modeling_gradprune import per_layer_overrides, text_config
from gradprune.models.residency import residency_of

MAX_SHARD_SIZE: str = OPTIONS["max_shard_size"].default
# The file is only copied and never imported here, because MLX need not be installed.
MLX_FILE = "modeling_mlx.py"
MLX_SOURCE = Path(gradprune.models.__file__).with_name(MLX_FILE)
_PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
MLX_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
"""Model types for which mlx-lm has the classes that `modeling_mlx.py` builds on."""


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | Path,
    *,
    overwrite: bool = False,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write a Hugging Face checkpoint, which appears completely or not at all and has the same bytes every time.

    It consists of the weights as safetensors files, the configuration, the tokenizer, the modelling files for
    transformers and MLX if needed, and the processor's files of a vision-language model.

    Args:
        model: the model, dense or pruned, streamed or not.
        tokenizer: its tokenizer; None writes none.
        directory: the folder to write.
        overwrite: whether an existing checkpoint may be replaced.
        max_shard_size: maximum size of a weights file, such as "5GB"; larger weights are divided into several files.

    Raises:
        CheckpointError: the folder exists and `overwrite` is False or it is not a checkpoint; or it cannot be written.
    """
    with atomic_directory(Path(directory), overwrite=overwrite, argument="directory", replaces=is_checkpoint) as folder:
        write_checkpoint(model, tokenizer, folder, max_shard_size)


def write_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, max_shard_size: str
) -> None:
    """Write the content of a checkpoint into `folder`, which the caller gives its final name; see `save_checkpoint`."""
    model.config.__dict__.pop("model_file", None)
    in_mlx = model.config.model_type in MLX_TYPES and bool(per_layer_overrides(model.config))
    if in_mlx:
        # The key by which mlx-lm finds the modelling file.
        model.config.model_file = MLX_FILE
    if per_layer_overrides(model.config):
        # Only transformers' own classes rename weights when loading, so these are saved under the names in the model.
        model.__dict__.pop("_weight_conversions", None)
    residency = residency_of(model)
    if residency is None:
        model.save_pretrained(folder, max_shard_size=bytes_of(max_shard_size))
    else:
        save_streamed(model, residency, folder, max_shard_size=bytes_of(max_shard_size))
    if in_mlx:
        shutil.copyfile(MLX_SOURCE, folder / MLX_FILE)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if text_config(model.config) is not model.config:
        _copy_processor(model.name_or_path or "", folder)


def _copy_processor(source: str, folder: Path) -> None:
    """Copy the processor's files of a vision-language model that `source`, a folder or id, has and `folder` lacks."""
    for name in _PROCESSOR if source else ():
        found = cached_file(
            source,
            name,
            local_files_only=Path(source).is_dir() or hub_fault() is not None,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None and not (folder / name).exists():
            shutil.copyfile(found, folder / name)
