"""Parameters and bytes of a model."""

from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelSize:
    """parameters: number of parameters, tied ones counted once. bytes: their memory, without buffers."""

    parameters: int
    bytes: int


def model_size(model: PreTrainedModel) -> ModelSize:
    """Count the parameters and bytes of a model's unique parameter tensors."""
    parameters = list(model.parameters())
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    )
