"""Checkpoints loaded whole and streamed."""

from pathlib import Path

from transformers import PreTrainedModel

from gradprune.checkpoint.load import load_model


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """Save the model to a checkpoint of several files and return its folder."""
    model.save_pretrained(folder, max_shard_size="6KB")
    return folder


def both(model: PreTrainedModel, folder: Path, **options: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Save the model to a checkpoint and load it twice: whole in memory, and streamed with `options`."""
    saved(model, folder)
    return load_model(folder)[0], load_model(folder, stream_layers="on", **options)[0]
