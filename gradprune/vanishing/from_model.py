"""Gradient statistics of decoder layers, read from the `.grad` that a backward pass left on the parameters."""

import math

from torch import Tensor, nn

from gradprune.config import GradientBackend
from gradprune.errors import GradPruneError, NonFiniteError
from gradprune.models.decoder_layers import find_decoder_layers
from gradprune.ops.dispatch import grad_stats
from gradprune.ops.vectors import GradientStatistics
from gradprune.vanishing.statistics import LayerGradients, layer_gradients


def gradients_of_model(model: nn.Module, backend: GradientBackend = "auto") -> list[LayerGradients]:
    """Compute statistics of each decoder layer over all its parameters with a `.grad`: weights, biases and norms.

    Weights are named after their module ("self_attn.q_proj"), as in the engine's statistics; other parameters have
    their own name ("self_attn.q_proj.bias"). A layer without any `.grad` has mean 0 and empty
    `parameter_norms`; a layer without parameters is left out. `backend` names the backend that computes the statistics,
    in fp32 (fp64 for fp64 gradients). Deterministic.

    Raises:
        GradPruneError: no parameter of any decoder layer has a `.grad`.
        NonFiniteError: a gradient is NaN or infinite, or its sum of squares overflows; the message names the parameter.
        UnsupportedArchitectureError: the model has no decoder layers that can be recognised.
    """
    layers = find_decoder_layers(model)
    gradients = {index: _gradients_of_layer(layer) for index, layer in enumerate(layers) if [*layer.parameters()]}
    if not any(gradients.values()):
        raise GradPruneError(
            f"gradients: none of the {len(layers)} decoder layers has a .grad; call loss.backward() first, "
            "and read the gradients before optimizer.zero_grad()"
        )
    # A single call reads the gradients of all layers, which saves launches.
    found = iter(grad_stats([gradient for own in gradients.values() for gradient in own.values()], backend).to_list())
    return [_layer_gradients(index, own, {name: next(found) for name in own}) for index, own in gradients.items()]


def _gradients_of_layer(layer: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.detach()
        for name, parameter in layer.named_parameters()
        if parameter.grad is not None and parameter.numel()
    }


def _layer_gradients(
    index: int, gradients: dict[str, Tensor], of_parameters: dict[str, GradientStatistics[float]]
) -> LayerGradients:
    if not gradients:
        return LayerGradients(index, mean=0.0, std=0.0, norm=0.0, maximum=0.0, minimum=0.0, parameter_norms={})
    statistics, elements = {}, {}
    for name, gradient in gradients.items():
        values = of_parameters[name]
        if values.non_finite > 0:
            raise NonFiniteError(
                f"gradient: {int(values.non_finite)} of {gradient.numel()} elements of layer {index}'s {name} are NaN "
                "or infinite; load the model in a wider dtype (bfloat16 or float32)"
            )
        if not math.isfinite(values.sum_abs + values.sum_square):
            raise NonFiniteError(f"gradient: the sum of squares of layer {index}'s {name} overflows")
        short = name.removesuffix(".weight")
        statistics[short], elements[short] = values, gradient.numel()
    return layer_gradients(index, statistics, elements, count=1)
