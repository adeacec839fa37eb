"""Scoring: from the evidence of a calibration pass to every group's importance, prior and score. No model is run."""

from dataclasses import replace

from gradprune.calibration.evidence import Evidence
from gradprune.config import Scoring
from gradprune.models import PrunableModel
from gradprune.scoring.hgsp import modulate
from gradprune.scoring.normalization import normalized_scores
from gradprune.scoring.table import GroupTable, empty_table


def score_groups(view: PrunableModel, evidence: Evidence, scoring: Scoring) -> GroupTable:
    """The table of all groups, with importances after gradient scaling, priors and scores.

    Args:
        view: the model's prunable view.
        evidence: of a calibration pass over it, with the priors that `scoring` needs.
        scoring: how; a method is named, "auto" has been decided.

    Raises:
        ConfigError: the evidence is of batches whose gradients were scaled in another way.
    """
    importance = evidence.importance(scoring.method, scoring.gradient_fix)
    table = replace(empty_table(view), importance=importance.double().numpy())
    table = replace(table, score=normalized_scores(table, scoring))
    return modulate(table, scoring.temperature, scoring.tau, evidence.priors.get(scoring.prior))
