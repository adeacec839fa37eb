"""Scoring: from the evidence of a calibration pass to every group's importance, prior and score. No model is run."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gradprune.calibration.evidence import Evidence
from gradprune.config import Method, Prior, PruneConfig
from gradprune.models import PrunableModel
from gradprune.scoring.hgsp import modulate
from gradprune.scoring.normalization import Normalization, normalized_scores
from gradprune.scoring.table import GroupTable, empty_table
from gradprune.vanishing.scaling import GradientRepair

_PLAIN = Normalization()


@dataclass(frozen=True)
class Scoring:
    """Everything that determines scores; `PruneConfig` describes the options of the same names."""

    method: Method = "group_fisher"
    gradient_fix: str = "none"
    normalization: Normalization = _PLAIN
    temperature: float = 0.0
    tau: float | None = None
    prior: Prior = "removal"

    @classmethod
    def of(cls, config: PruneConfig) -> "Scoring":
        """The scoring among a run's options; "auto" has been resolved."""
        assert config.importance_method != "auto"
        return cls(
            config.importance_method,
            config.gradient_fix,
            Normalization(
                config.normalize_scores, config.normalize_per, config.clip_percentile, config.attention_factor
            ),
            config.temperature,
            config.tau,
            config.prior,
        )


def score_groups(view: PrunableModel, evidence: Evidence, scoring: Scoring) -> GroupTable:
    """The table of all groups, with importances after gradient scaling, priors and scores.

    Args:
        view: the model's prunable view.
        evidence: of a calibration pass over it, with the priors that `scoring` needs.
        scoring: how.

    Raises:
        ConfigError: the evidence is of batches whose gradients were scaled in another way.
    """
    repair = evidence.repaired(scoring.gradient_fix, len(view.layers))
    # Batches were scaled as they came.
    scales = group_scales(view, repair if evidence.reduction == "sample" else None)
    table = replace(empty_table(view), importance=evidence.importance(scoring.method, scales))
    table = replace(table, score=normalized_scores(table, scoring.normalization))
    return modulate(table, scoring.temperature, scoring.tau, evidence.priors.get(scoring.prior))


def group_scales(view: PrunableModel, repair: GradientRepair | None) -> NDArray[np.float64]:
    """[groups] fp64, the scale of each group's layer."""
    table = empty_table(view)
    return np.ones(len(table)) if repair is None else np.array(repair.scales)[table.layer]
