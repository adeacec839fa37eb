"""Gradient-based structured pruning of large language models.

The public names are imported on first use, so that `import gradprune` is light and works without a GPU,
Triton, a compiler or the network.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradprune.version import __version__

if TYPE_CHECKING:
    from gradprune.calibration.engine import ImportanceEngine
    from gradprune.checkpoint.load import load_pruned
    from gradprune.config import PruneConfig
    from gradprune.errors import GradPruneError
    from gradprune.pipeline import prune
    from gradprune.report.visualizer import GradientVisualizer
    from gradprune.result import PruneResult
    from gradprune.vanishing.in_place import (
        adaptive_gradient_scaling,
        normalize_gradients_per_layer,
        weight_gradients_by_depth,
    )

_HOME = {
    "GradPruneError": "gradprune.errors",
    "GradientVisualizer": "gradprune.report.visualizer",
    "ImportanceEngine": "gradprune.calibration.engine",
    "PruneConfig": "gradprune.config",
    "PruneResult": "gradprune.result",
    "adaptive_gradient_scaling": "gradprune.vanishing.in_place",
    "load_pruned": "gradprune.checkpoint.load",
    "normalize_gradients_per_layer": "gradprune.vanishing.in_place",
    "prune": "gradprune.pipeline",
    "weight_gradients_by_depth": "gradprune.vanishing.in_place",
}

__all__ = [
    "GradPruneError",
    "GradientVisualizer",
    "ImportanceEngine",
    "PruneConfig",
    "PruneResult",
    "__version__",
    "adaptive_gradient_scaling",
    "load_pruned",
    "normalize_gradients_per_layer",
    "prune",
    "weight_gradients_by_depth",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gradprune' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
