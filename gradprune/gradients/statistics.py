"""Gradient statistics of decoder layers, from the per-weight statistics that the engine collects."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerGradients:
    """The gradients of one decoder layer's prunable weights, over all samples (`batch`: over all batches).

    mean, std: of |g| over the layer's elements and the samples (population std).
    norm: L2 norm, sqrt of the mean over samples of the sum of g^2.
    maximum, minimum: of |g|.
    parameter_norms: n_p = sqrt(mean over samples of ||g||^2) by weight name, e.g. "self_attn.q_proj".
    """

    layer: int
    mean: float
    std: float
    norm: float
    maximum: float
    minimum: float
    parameter_norms: dict[str, float]

    def scaled(self, scale: float) -> "LayerGradients":
        """The statistics of the same gradients times `scale` > 0."""
        return LayerGradients(
            layer=self.layer,
            mean=scale * self.mean,
            std=scale * self.std,
            norm=scale * self.norm,
            maximum=scale * self.maximum,
            minimum=scale * self.minimum,
            parameter_norms={name: scale * norm for name, norm in self.parameter_norms.items()},
        )


def layer_gradients(
    layer: int, statistics: dict[str, list[float]], elements: dict[str, int], count: int
) -> LayerGradients:
    """Combine a layer's per-weight statistics.

    Args:
        layer: index of the decoder layer.
        statistics: per weight, (sum|g|, sum g^2, max|g|, min|g|, non-finite) over `count` gradients.
        elements: per weight, its number of elements.
        count: number of gradients (samples or batches) in the sums.
    """
    total = sum(elements.values()) * count
    mean = math.fsum(s[0] for s in statistics.values()) / total
    square = math.fsum(s[1] for s in statistics.values())
    return LayerGradients(
        layer=layer,
        mean=mean,
        std=math.sqrt(max(square / total - mean * mean, 0.0)),
        norm=math.sqrt(square / count),
        maximum=max(s[2] for s in statistics.values()),
        minimum=min(s[3] for s in statistics.values()),
        parameter_norms={name: math.sqrt(s[1] / count) for name, s in statistics.items()},
    )


def gradient_ratio(layers: list[LayerGradients]) -> float:
    """Largest layer mean over smallest; infinite where a layer's mean is 0."""
    means = [layer.mean for layer in layers]
    return max(means) / min(means) if min(means) > 0.0 else math.inf
