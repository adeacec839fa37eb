"""Fixes for vanishing gradients: pure functions from the layers' gradient norms to one scale per layer.

n_p is the L2 norm of parameter p's gradient, m_l the mean of n_p over layer l's parameters. For layers l = 0..L-1:

- `adaptive`: clip(median of n_p over all parameters / m_l, 0.1, 10), where the median is the upper one.
- `normalize`: 1 / m_l.
- `depth:linear`: (L - l) / L + 0.5; `depth:sqrt`: sqrt((L - l) / L) + 0.5;
  `depth:log`: log(L - l + 1) / log(L + 1) + 0.5.
- a chain such as `adaptive+depth:sqrt`: the product of its parts' scales, each computed on the gradients as scaled by
  the parts before it.

A layer with m_l = 0 keeps scale 1. A scale s multiplies |w g| by s and w^2 g^2 by s^2.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_high

from gradprune.config import check_gradient_fix
from gradprune.errors import ConfigError
from gradprune.vanishing.diagnosis import Verdict, diagnose_gradients
from gradprune.vanishing.statistics import LayerGradients

LayerNorms = Sequence[Sequence[float]]
"""For each decoder layer, n_p of each of its parameters."""

_CLIP = (0.1, 10.0)

_DEPTH_WEIGHTS: dict[str, Callable[[int, int], float]] = {
    "linear": lambda layer, layers: (layers - layer) / layers + 0.5,
    "sqrt": lambda layer, layers: math.sqrt((layers - layer) / layers) + 0.5,
    "log": lambda layer, layers: math.log(layers - layer + 1) / math.log(layers + 1) + 0.5,
}

_FIX_OF_VERDICT: dict[Verdict, str] = {"normal": "none", "mild": "adaptive", "severe": "adaptive+depth:sqrt"}


@dataclass(frozen=True)
class GradientScaling:
    """The effect of a fix on the layers' gradients.

    fix: the fix that was applied; "auto" has been resolved, to "none" if no fix was needed.
    scales: one per decoder layer; with `reduction="batch"`, which scales each batch, the mean over the batches.
    after: the layers' gradient statistics after the fix.
    """

    fix: str
    scales: list[float]
    after: list[LayerGradients]


def layer_scales(fix: str, norms: LayerNorms) -> list[float]:
    """Compute one scale per layer.

    Args:
        fix: "none", one of `gradprune.config.GRADIENT_FIXES`, or a chain of these joined by "+".
        norms: for each layer, n_p of its parameters; a layer without any keeps scale 1.

    Raises:
        ConfigError: the fix is unknown.
    """
    scales = [1.0] * len(norms)
    if fix == "none":
        return scales
    check_gradient_fix(fix)
    for part in fix.split("+"):
        scaled = [[norm * scale for norm in layer] for layer, scale in zip(norms, scales, strict=True)]
        scales = [scale * step for scale, step in zip(scales, _step_scales(part, scaled), strict=True)]
    return scales


def adaptive_scales(norms: LayerNorms) -> list[float]:
    """Compute clip(median of n_p over all parameters / m_l, 0.1, 10) for each layer l."""
    everything = [norm for layer in norms for norm in layer]
    if not everything:
        return [1.0] * len(norms)
    median = median_high(everything)
    return [min(max(median / mean, _CLIP[0]), _CLIP[1]) if mean > 0.0 else 1.0 for mean in map(_mean, norms)]


def normalize_scales(norms: LayerNorms) -> list[float]:
    """Compute 1 / m_l for each layer l."""
    return [1.0 / mean if mean > 0.0 else 1.0 for mean in map(_mean, norms)]


def depth_scales(strategy: str, norms: LayerNorms) -> list[float]:
    """Compute scales that are larger for earlier layers, with strategy "linear", "sqrt" or "log".

    Raises:
        ConfigError: the strategy is unknown.
    """
    if strategy not in _DEPTH_WEIGHTS:
        raise ConfigError(f"strategy: '{strategy}' is unknown; choose one of {', '.join(_DEPTH_WEIGHTS)}")
    weight = _DEPTH_WEIGHTS[strategy]
    means = map(_mean, norms)
    return [weight(layer, len(norms)) if mean > 0.0 else 1.0 for layer, mean in enumerate(means)]


def _step_scales(part: str, norms: LayerNorms) -> list[float]:
    if part == "adaptive":
        return adaptive_scales(norms)
    if part == "normalize":
        return normalize_scales(norms)
    return depth_scales(part.removeprefix("depth:"), norms)


def _mean(norms: Sequence[float]) -> float:
    """Return m_l, or 0 for a layer without gradients."""
    return math.fsum(norms) / len(norms) if norms else 0.0


def resolve_fix(fix: str, gradients: list[LayerGradients]) -> str:
    """Return `fix` itself, or, if it is "auto", the fix that the diagnosis of `gradients` recommends."""
    return _FIX_OF_VERDICT[diagnose_gradients(gradients).verdict] if fix == "auto" else fix


def scales_of(fix: str, gradients: list[LayerGradients], layers: int) -> list[float]:
    """Compute one scale for each of the model's `layers` decoder layers; layers not in `gradients` keep scale 1."""
    norms: list[list[float]] = [[] for _ in range(layers)]
    for layer in gradients:
        norms[layer.layer] = list(layer.parameter_norms.values())
    return layer_scales(resolve_fix(fix, gradients), norms)
