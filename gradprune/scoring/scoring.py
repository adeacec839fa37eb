"""Scoring: from the evidence of a calibration pass to every group's importance, prior and score. No model is run."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gradprune.calibration.evidence import Evidence
from gradprune.config import Scoring
from gradprune.models import PrunableModel
from gradprune.scoring.hgsp import modulate
from gradprune.scoring.normalization import normalized_scores
from gradprune.scoring.table import GroupTable, group_costs
from gradprune.vanishing.scaling import GradientRepair


def score_groups(view: PrunableModel, evidence: Evidence, scoring: Scoring) -> GroupTable:
    """The table of all groups, with importances after the gradient repair, priors and scores.

    Args:
        view: the model's prunable view.
        evidence: of a calibration pass over it, with the priors that `scoring` needs.
        scoring: how; a method is named, "auto" has been decided.

    Raises:
        ConfigError: the evidence is of batches that were repaired in another way.
    """
    assert scoring.importance_method != "auto"
    repair = evidence.repaired(scoring.gradient_fix, len(view.layers))
    # Batches were repaired as they came.
    scales = group_scales(view, repair if evidence.reduction == "sample" else None)
    table = replace(group_costs(view), importance=evidence.importance(scoring.importance_method, scales))
    table = replace(table, score=normalized_scores(table, scoring))
    return modulate(table, scoring.temperature, scoring.tau, evidence.priors.get(scoring.prior))


def group_scales(view: PrunableModel, repair: GradientRepair | None) -> NDArray[np.float64]:
    """[groups] fp64, the scale of each group's layer."""
    table = group_costs(view)
    return np.ones(len(table)) if repair is None else np.array(repair.scales)[table.layer]
