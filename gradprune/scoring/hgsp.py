"""TODO"""

from dataclasses import replace

import numpy as np

from gradprune.calibration.priors import Priors
from gradprune.models.blocks import KINDS
from gradprune.scoring.table import GroupTable


def modulate(table: GroupTable, temperature: float, tau: float | None, priors: Priors | None) -> GroupTable:
    """The table with `prior` filled in and `score` modulated.

    Args:
        table: with scores of at least 0, e.g. importance / cost.
        temperature: T >= 0.
        tau: gate on the layer's importance; 0 makes every group block-dominant, inf layer-dominant, None takes
            the 25th percentile of the layer importances.
        priors: needed where T > 0, ignored at T = 0.
    """
    if temperature == 0.0:
        return table
    assert priors is not None, "priors are needed at a temperature above 0"
    if tau is None:
        tau = float(np.percentile(list(priors.layer.values()), 25))
    prior = np.empty(len(table))
    for (kind, layer), value in priors.block.items():
        of_block = (table.layer == layer) & (table.kind == KINDS.index(kind))
        prior[of_block] = priors.layer[layer] if priors.layer[layer] < tau else value
    modulation = np.log1p(np.maximum(prior, 0.0)) ** temperature
    return replace(table, prior=prior, score=table.score * modulation)
