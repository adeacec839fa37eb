"""Gradient-based structured pruning of large language models.

The public names are imported on first use, so that `import gradprune` is light and works without a GPU,
Triton, a compiler or the network.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradprune.checkpoint import load_pruned
    from gradprune.config import PruneConfig
    from gradprune.errors import GradPruneError
    from gradprune.gradients.in_place import (
        adaptive_gradient_scaling,
        normalize_gradients_per_layer,
        weight_gradients_by_depth,
    )
    from gradprune.gradients.visualizer import GradientVisualizer
    from gradprune.importance.engine import ImportanceEngine
    from gradprune.pipeline import PruneResult, prune

__version__ = "0.1.0"

_HOME = {
    "GradPruneError": "gradprune.errors",
    "GradientVisualizer": "gradprune.gradients.visualizer",
    "ImportanceEngine": "gradprune.importance.engine",
    "PruneConfig": "gradprune.config",
    "PruneResult": "gradprune.pipeline",
    "adaptive_gradient_scaling": "gradprune.gradients.in_place",
    "load_pruned": "gradprune.checkpoint",
    "normalize_gradients_per_layer": "gradprune.gradients.in_place",
    "prune": "gradprune.pipeline",
    "weight_gradients_by_depth": "gradprune.gradients.in_place",
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
