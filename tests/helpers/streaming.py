"""Checkpoints loaded whole and streamed."""

from pathlib import Path

from transformers import PreTrainedModel

from gradprune.checkpoint.load import load_model


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """A checkpoint of several files."""
    model.save_pretrained(folder, max_shard_size="6KB")
    return folder


def both(model: PreTrainedModel, folder: Path, **options: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model of a new checkpoint, whole in memory and streamed."""
    saved(model, folder)
    return load_model(folder)[0], load_model(folder, stream_layers="on", **options)[0]
