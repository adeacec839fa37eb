"""The ops, which reduce weights, gradients and activations to a few vectors, on any backend that runs here.

Usage: `from gradprune.ops import linear_importance, taylor_score`.
"""

from gradprune.ops.dispatch import (
    cheapest_removals,
    grad_stats,
    grouped_linear_importance,
    linear_importance,
    mask_gradient,
    scale_gradients,
    taylor_score,
)
from gradprune.ops.removals import Removals
from gradprune.ops.vectors import GradientStatistics, GroupedVectors, ImportanceVectors, MaskGradient

__all__ = [
    "GradientStatistics",
    "GroupedVectors",
    "ImportanceVectors",
    "MaskGradient",
    "Removals",
    "cheapest_removals",
    "grad_stats",
    "grouped_linear_importance",
    "linear_importance",
    "mask_gradient",
    "scale_gradients",
    "taylor_score",
]
