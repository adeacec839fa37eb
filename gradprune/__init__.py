"""Gradient-based structured pruning of large language models.

The public names are imported on first use, so that `import gradprune` is light and works without a GPU,
Triton, a compiler or the network.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradprune.version import __version__

if TYPE_CHECKING:
    from gradprune.calibration.engine import ImportanceEngine
    from gradprune.calibration.evidence import Evidence, Scores
    from gradprune.checkpoint.load import load_model, load_pruned
    from gradprune.checkpoint.save import save_checkpoint
    from gradprune.config import PruneConfig
    from gradprune.config.recovery_config import RecoveryConfig
    from gradprune.errors import GradPruneError
    from gradprune.evaluation.perplexity import perplexity
    from gradprune.evaluation.tasks import evaluate_tasks
    from gradprune.export.gguf import export_gguf
    from gradprune.pipeline import prune, prune_ratios
    from gradprune.recovery.recover import recover
    from gradprune.report.visualizer import GradientVisualizer
    from gradprune.result import PruneResult
    from gradprune.vanishing.in_place import (
        adaptive_gradient_scaling,
        normalize_gradients_per_layer,
        weight_gradients_by_depth,
    )

_HOME = {
    "Evidence": "gradprune.calibration.evidence",
    "GradPruneError": "gradprune.errors",
    "GradientVisualizer": "gradprune.report.visualizer",
    "ImportanceEngine": "gradprune.calibration.engine",
    "PruneConfig": "gradprune.config",
    "PruneResult": "gradprune.result",
    "RecoveryConfig": "gradprune.config.recovery_config",
    "Scores": "gradprune.calibration.evidence",
    "adaptive_gradient_scaling": "gradprune.vanishing.in_place",
    "evaluate_tasks": "gradprune.evaluation.tasks",
    "export_gguf": "gradprune.export.gguf",
    "load_model": "gradprune.checkpoint.load",
    "load_pruned": "gradprune.checkpoint.load",
    "normalize_gradients_per_layer": "gradprune.vanishing.in_place",
    "perplexity": "gradprune.evaluation.perplexity",
    "prune": "gradprune.pipeline",
    "prune_ratios": "gradprune.pipeline",
    "recover": "gradprune.recovery.recover",
    "save_checkpoint": "gradprune.checkpoint.save",
    "weight_gradients_by_depth": "gradprune.vanishing.in_place",
}

__all__ = [
    "Evidence",
    "GradPruneError",
    "GradientVisualizer",
    "ImportanceEngine",
    "PruneConfig",
    "PruneResult",
    "RecoveryConfig",
    "Scores",
    "__version__",
    "adaptive_gradient_scaling",
    "evaluate_tasks",
    "export_gguf",
    "load_model",
    "load_pruned",
    "normalize_gradients_per_layer",
    "perplexity",
    "prune",
    "prune_ratios",
    "recover",
    "save_checkpoint",
    "weight_gradients_by_depth",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gradprune' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
