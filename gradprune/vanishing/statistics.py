"""Gradient statistics of decoder layers, from the per-weight statistics that the engine collects."""

import math
from dataclasses import dataclass

from gradprune.ops.vectors import GradientStatistics


@dataclass(frozen=True)
class LayerGradients:
    """Gradient statistics of a decoder layer's prunable weights, over all samples (reduction `batch`: all batches).

    layer: index of the layer.
    mean, std: mean and population standard deviation of |g| over the layer's elements and the samples.
    norm: L2 norm, the square root of the mean over samples of the sum of g^2.
    maximum, minimum: the largest and the smallest |g|.
    parameter_norms: n_p = sqrt(mean over samples of ||g||^2) by weight name, such as "self_attn.q_proj".
    """

    layer: int
    mean: float
    std: float
    norm: float
    maximum: float
    minimum: float
    parameter_norms: dict[str, float]

    def scaled(self, scale: float) -> "LayerGradients":
        """Return the statistics of the same gradients multiplied by `scale` > 0."""
        return LayerGradients(
            layer=self.layer,
            mean=scale * self.mean,
            std=scale * self.std,
            norm=scale * self.norm,
            maximum=scale * self.maximum,
            minimum=scale * self.minimum,
            parameter_norms={name: scale * norm for name, norm in self.parameter_norms.items()},
        )

    @property
    def frozen(self) -> bool:
        """Whether no parameter of the layer has a gradient."""
        return not self.parameter_norms


def layer_gradients(
    layer: int, statistics: dict[str, GradientStatistics[float]], elements: dict[str, int], count: int
) -> LayerGradients:
    """Combine the statistics of a layer's weights into statistics of the layer.

    Args:
        layer: index of the decoder layer.
        statistics: by weight name, the statistics summed over `count` gradients.
        elements: by weight name, the weight's number of elements.
        count: number of gradients (samples or batches) in the sums.
    """
    total = sum(elements.values()) * count
    mean = math.fsum(s.sum_abs for s in statistics.values()) / total
    square = math.fsum(s.sum_square for s in statistics.values())
    return LayerGradients(
        layer=layer,
        mean=mean,
        std=math.sqrt(max(square / total - mean * mean, 0.0)),
        norm=math.sqrt(square / count),
        maximum=max(s.max_abs for s in statistics.values()),
        minimum=min(s.min_abs for s in statistics.values()),
        parameter_norms={name: math.sqrt(s.sum_square / count) for name, s in statistics.items()},
    )


def gradient_ratio(layers: list[LayerGradients]) -> float:
    """Return the largest layer mean divided by the smallest; infinite if a layer's mean is 0."""
    means = [layer.mean for layer in layers]
    return max(means) / min(means) if min(means) > 0.0 else math.inf


def pool_steps(steps: list[list[LayerGradients]]) -> list[LayerGradients]:
    """Pool the statistics of several steps (at least one) with equal weights, as if each step were a sample.

    Return one entry per layer. A layer or parameter that some steps lack is pooled over the steps that have it.
    """
    indices = sorted({layer.layer for step in steps for layer in step})
    return [_pool_layer([layer for step in steps for layer in step if layer.layer == index]) for index in indices]


def _pool_layer(layers: list[LayerGradients]) -> LayerGradients:
    mean = math.fsum(layer.mean for layer in layers) / len(layers)
    # Law of total variance: the mean of the steps' variances plus the variance of their means.
    variance = math.fsum(layer.std**2 + (layer.mean - mean) ** 2 for layer in layers) / len(layers)
    names = dict.fromkeys(name for layer in layers for name in layer.parameter_norms)
    norms = {name: [layer.parameter_norms[name] for layer in layers if name in layer.parameter_norms] for name in names}
    return LayerGradients(
        layer=layers[0].layer,
        mean=mean,
        std=math.sqrt(variance),
        norm=_root_mean_square([layer.norm for layer in layers]),
        maximum=max(layer.maximum for layer in layers),
        minimum=min(layer.minimum for layer in layers),
        parameter_norms={name: _root_mean_square(values) for name, values in norms.items()},
    )


def _root_mean_square(values: list[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))
