"""Parameters and bytes of a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelSize:
    """parameters: tied ones counted once. bytes: of their tensors in memory; buffers are left out."""

    parameters: int
    bytes: int


def model_size(model: "PreTrainedModel") -> ModelSize:
    """Parameters and bytes of a model's unique tensors."""
    parameters = list(model.parameters())
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    )


def weight_bytes_on_disk(checkpoint: str | Path) -> int | None:
    """Bytes of a checkpoint folder's safetensors files; None where there are none, e.g. for a hub id."""
    files = list(Path(checkpoint).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else None
