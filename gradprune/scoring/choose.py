"""The choice of the groups that go: score, select, mask. No model is run."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gradprune.calibration.evidence import Evidence
from gradprune.config import Constraints, Scoring
from gradprune.models import PrunableModel
from gradprune.models.masks import GroupMasks
from gradprune.scoring.hgsp import modulate
from gradprune.scoring.normalization import normalized_scores
from gradprune.scoring.selection import select
from gradprune.scoring.table import GroupTable, empty_table


@dataclass(frozen=True)
class Choice:
    """Every group with its score, and whether it goes.

    pruned: [len(table)] bool.
    """

    table: GroupTable
    pruned: NDArray[np.bool_]

    @property
    def masks(self) -> GroupMasks:
        """What each block keeps."""
        return self.table.masks(self.pruned)


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


def choose(view: PrunableModel, evidence: Evidence, scoring: Scoring, constraints: Constraints, ratio: float) -> Choice:
    """Score all groups by `scoring` and take the lowest until `ratio` of the model's parameters is gone.

    Args:
        view: the model.
        evidence: of a calibration pass over it, with the priors that `scoring` needs.
        scoring, constraints: how groups are scored, and what limits the selection.
        ratio: fraction of the model's parameters to remove, in (0, 1).

    Raises:
        SelectionError: the ratio cannot be reached under the constraints.
        ConfigError: as `score_groups` and `select`.
    """
    table = score_groups(view, evidence, scoring)
    return Choice(table, select(table, ratio, view.parameters, constraints))
