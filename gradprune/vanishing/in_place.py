"""Fixes for vanishing gradients, applied in place to `.grad` after `loss.backward()`, for your own training loops.

The formulas are those of `gradprune.vanishing.scaling`, with n_p the norm of the gradient at hand. Only parameters of
decoder layers are touched; the layers are found in any model, pruned by gradprune or not (`find_decoder_layers`).
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
    """What was done to a model's gradients.

    norms: per decoder layer, n_p by parameter name, before scaling. scales: per decoder layer, the factor its gradients
        were multiplied by; 1 if it has none.
    """

    norms: list[dict[str, float]]
    scales: list[float]


def adaptive_gradient_scaling(model: nn.Module, backend: GradientBackend = "auto") -> ScaledGradients:
    """Multiply layer l's gradients by clip(median of all n_p / mean n_p of layer l, 0.1, 10), in place.

    Args:
        model: after `loss.backward()`; parameters without a `.grad` are left alone.
        backend: computes the norms and the scaling.

    Raises:
        GradPruneError: no parameter of a decoder layer has a `.grad`: call `loss.backward()` first.
        NonFiniteError: a gradient is NaN or infinite, or its sum of squares overflows; the message names the parameter.
        UnsupportedArchitectureError: no decoder layers found.
    """
    return _scale(model, adaptive_scales, backend)


def normalize_gradients_per_layer(model: nn.Module, backend: GradientBackend = "auto") -> ScaledGradients:
    """Multiply layer l's gradients by 1 / mean n_p of layer l, in place.

    Arguments and errors as for `adaptive_gradient_scaling`.
    """
    return _scale(model, normalize_scales, backend)


def weight_gradients_by_depth(
    model: nn.Module, strategy: str = "sqrt", backend: GradientBackend = "auto"
) -> ScaledGradients:
    """Multiply the gradients of layer l of L by a weight of at most 1.5, larger for earlier layers, in place.

    Args:
        model, backend: as for `adaptive_gradient_scaling`.
        strategy: "linear", (L - l) / L + 0.5; "sqrt", sqrt((L - l) / L) + 0.5; or "log",
            log(L - l + 1) / log(L + 1) + 0.5.

    Raises:
        ConfigError: unknown strategy; no gradient was changed. Others as for `adaptive_gradient_scaling`.
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
