"""Parameters and bytes of a model."""

from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelSize:
    """parameters: tied ones count once. bytes: memory of the parameters, without buffers."""

    parameters: int
    bytes: int


def model_size(model: PreTrainedModel) -> ModelSize:
    """Parameters and bytes of a model's unique tensors."""
    parameters = list(model.parameters())
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    )
