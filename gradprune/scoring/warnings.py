"""Warnings about a selection that differs from what was asked for, or that the scores could not decide."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gradprune.config import PruneConfig
from gradprune.scoring.selection import least_cost
from gradprune.scoring.table import GroupTable

# The relative excess over the requested ratio above which a warning is given.
_TOLERANCE = 1e-9


def selection_warnings(
    table: GroupTable, pruned: NDArray[np.bool_], parameters: int, config: PruneConfig
) -> Iterator[str]:
    """Yield a warning of one or two sentences for each problem of a selection.

    Args:
        table: every group with its score.
        pruned: [len(table)] bool, True for a pruned group.
        parameters: number of parameters of the whole model.
        config: the options of the run, with the requested ratio and the constraints.
    """
    ratio = int(table.cost[pruned].sum()) / parameters
    if ratio > config.pruning_ratio * (1.0 + _TOLERANCE):
        yield (
            f"epsilon {config.epsilon:g} dropped whole layers: {ratio:.1%} of the parameters were removed, not the "
            f"requested {config.pruning_ratio:.1%}. Try a smaller --epsilon."
        )
    if not pruned.any():
        yield (
            f"Nothing was pruned: pruning_ratio {config.pruning_ratio:g} is {config.pruning_ratio * parameters:,.1f} "
            f"parameters, but the least that can be removed is {least_cost(table, config.constraints):,}."
        )
    zeros = int((table.score == 0.0).sum())
    if zeros > int(pruned.sum()) and zeros > int((table.importance == 0.0).sum()):
        yield (
            f"The scores of {zeros:,} of {len(table):,} groups came out as 0, so their order in the model decided "
            "which of them were pruned. Try a smaller --temperature, or an --attention_factor nearer to 1."
        )
