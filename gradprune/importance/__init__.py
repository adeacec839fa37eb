"""Gradient importance: the ops with their backends, and the engine that runs them over a model.

from gradprune.importance import ImportanceEngine, taylor_score
"""

from gradprune.importance.engine import ImportanceEngine, Scores
from gradprune.importance.ops import linear_importance, taylor_score
from gradprune.importance.vectors import ImportanceVectors

__all__ = ["ImportanceEngine", "ImportanceVectors", "Scores", "linear_importance", "taylor_score"]
