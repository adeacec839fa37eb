"""Fixes for vanishing gradients, applied in place to `.grad` after `loss.backward()`, for your own training loops.

The formulas are those of `gradprune.vanishing.scaling`, where n_p is the norm of the gradient in `.grad`. Only
parameters of decoder layers are scaled; the layers are found in any model, pruned by gradprune or not
(`find_decoder_layers`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from gradprune.config import GradientBackend
from gradprune.models.decoder_layers import find_decoder_layers
from gradprune.ops.dispatch import scale_gradients
from gradprune.vanishing.from_model import gradients_of_model
from gradprune.vanishing.scaling import LayerNorms, adaptive_scales, depth_scales, normalize_scales


@dataclass(frozen=True)
class ScaledGradients:
    """A record of how a model's gradients were scaled.

    norms: for each decoder layer, n_p by parameter name, before scaling.
    scales: for each decoder layer, the factor that its gradients were multiplied by; 1 if the layer has no gradients.
    """

    norms: list[dict[str, float]]
    scales: list[float]


def adaptive_gradient_scaling(model: nn.Module, backend: GradientBackend = "auto") -> ScaledGradients:
    """Multiply layer l's gradients by clip(median of all n_p / mean n_p of layer l, 0.1, 10), in place.

    Args:
        model: the model after `loss.backward()`; parameters without a `.grad` are left alone.
        backend: the backend that computes the norms and scales the gradients.

    Raises:
        GradPruneError: no parameter of a decoder layer has a `.grad`; call `loss.backward()` first.
        NonFiniteError: a gradient is NaN or infinite, or its sum of squares overflows; the message names the parameter.
        UnsupportedArchitectureError: the model has no decoder layers that can be recognised.
    """
    return _scale(model, adaptive_scales, backend)


def normalize_gradients_per_layer(model: nn.Module, backend: GradientBackend = "auto") -> ScaledGradients:
    """Multiply layer l's gradients by 1 / mean n_p of layer l, in place.

    See `adaptive_gradient_scaling` for arguments and errors.
    """
    return _scale(model, normalize_scales, backend)


def weight_gradients_by_depth(
    model: nn.Module, strategy: str = "sqrt", backend: GradientBackend = "auto"
) -> ScaledGradients:
    """Multiply the gradients of layer l of L by a weight of at most 1.5, larger for earlier layers, in place.

    Args:
        model, backend: see `adaptive_gradient_scaling`.
        strategy: "linear", (L - l) / L + 0.5; "sqrt", sqrt((L - l) / L) + 0.5; or "log",
            log(L - l + 1) / log(L + 1) + 0.5.

    Raises:
        ConfigError: the strategy is unknown; no gradient was changed. See also `adaptive_gradient_scaling`.
    """
    return _scale(model, lambda norms: depth_scales(strategy, norms), backend)


def _scale(
    model: nn.Module, scales_of: Callable[[LayerNorms], list[float]], backend: GradientBackend
) -> ScaledGradients:
    layers = find_decoder_layers(model)
    norms: list[dict[str, float]] = [{} for _ in layers]
    for layer in gradients_of_model(model, backend):
        norms[layer.layer] = layer.parameter_norms
    scales = scales_of([list(of_layer.values()) for of_layer in norms])
    gradients: list[Tensor] = []
    factors: list[float] = []
    for layer_module, scale in zip(layers, scales, strict=True):
        own = [parameter.grad for parameter in layer_module.parameters() if parameter.grad is not None]
        gradients += own
        factors += [scale] * len(own)
    scale_gradients(gradients, factors, backend)
    return ScaledGradients(norms, scales)
