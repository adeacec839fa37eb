"""Placement: the device of a model, or the several devices that it is spread over, with each layer whole on one.

accelerate's hooks move the residual stream from device to device; see `device_map` in `gradprune.checkpoint.load`.
"""

import torch
from transformers import PreTrainedModel

from gradprune.errors import ConfigError, one_line
from gradprune.models.residency import residency_of
from gradprune.models.view import layers_of


def device_of_name(name: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA if available, else the CPU.

    Raises:
        ConfigError: the device cannot hold weights.
    """
    found = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: '{found}' does not work here: {one_line(error)}") from error
    if torch.device(found).type == "meta":
        raise ConfigError("device: 'meta' holds no weights; choose cpu or cuda")
    return torch.device(found)


def check_placement(model: PreTrainedModel) -> None:
    """Check that all weights are on a device, and each decoder layer on a single one; a streamed model always passes.

    Raises:
        ConfigError: a weight or a layer is not; the first one is named.
    """
    if residency_of(model) is not None:
        return
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise ConfigError(
            f"model: {len(absent)} weights are on no device, first {absent[0]}: a device_map has left them in memory "
            "or on disk, or the model was made on the meta device; load it on devices that hold it, or with "
            "stream_layers 'on'"
        )
    for index, layer in enumerate(layers_of(model)):
        devices = sorted({str(parameter.device) for parameter in layer.parameters()})
        if len(devices) > 1:
            raise ConfigError(
                f"device_map: divides decoder layer {index} between {' and '.join(devices)}; each layer is to be whole "
                "on one device"
            )
