"""Choice of the groups to prune: score all groups, select the lowest, return masks. The model is not run."""

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
    """The outcome of a selection: every group with its score, and whether it is pruned.

    table: one row per group. pruned: [len(table)] bool, True for a group to remove.
    """

    table: GroupTable
    pruned: NDArray[np.bool_]

    @property
    def masks(self) -> GroupMasks:
        """The masks of the groups that each block keeps."""
        return self.table.masks(self.pruned)


def score_groups(view: PrunableModel, evidence: Evidence, scoring: Scoring) -> GroupTable:
    """Return the table of all groups with their importances (after gradient scaling), priors and scores.

    Args:
        view: the model's prunable view.
        evidence: the result of a calibration pass over that model, with the priors that `scoring` needs.
        scoring: how to score; `method` names a method, since "auto" has been resolved before.

    Raises:
        ConfigError: `scoring.gradient_fix` cannot be applied to this evidence: its batches were scaled by another fix,
            or weight gradients were taken of only some samples.
        GradPruneError: the calibration pass did not collect what `scoring.method` needs.
    """
    importance = evidence.importance(scoring.method, scoring.gradient_fix)
    table = replace(empty_table(view), importance=importance.double().numpy())
    table = replace(table, score=normalized_scores(table, scoring))
    return modulate(table, scoring.temperature, scoring.tau, evidence.priors.get(scoring.prior))


def choose(view: PrunableModel, evidence: Evidence, scoring: Scoring, constraints: Constraints, ratio: float) -> Choice:
    """Score all groups and select the lowest-scored ones until they hold `ratio` of the model's parameters.

    Args:
        view: the model's prunable view.
        evidence: the result of a calibration pass over that model, with the priors that `scoring` needs.
        scoring: how groups are scored.
        constraints: what limits the selection.
        ratio: fraction of the model's parameters to remove, in (0, 1).

    Raises:
        SelectionError: the ratio cannot be reached under the constraints.
        ConfigError, GradPruneError: see `score_groups` and `select`.
    """
    table = score_groups(view, evidence, scoring)
    return Choice(table, select(table, ratio, view.parameters, constraints))
