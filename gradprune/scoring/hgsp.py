"""H-GSP, hierarchical global structural pruning: modulate group scores by how much their block or layer matters.

score(group) = importance / cost * M with M = B^T and B = ln(1 + max(prior, 0)); T is the temperature, and
importance / cost may have been normalised before. The prior is the layer's if the layer's importance is below tau
(layer-dominant), else the block's (block-dominant). At T = 0, M = 1 and no prior is needed.
"""

from dataclasses import replace

import numpy as np

from gradprune.calibration.priors import Priors
from gradprune.scoring.table import GroupTable


def modulate(table: GroupTable, temperature: float, tau: float | None, priors: Priors | None) -> GroupTable:
    """Return the table with `prior` filled in and `score` multiplied by M; at T = 0, the table as it is.

    Args:
        table: the groups with scores of at least 0, such as importance / cost.
        temperature: T >= 0.
        tau: gate on the layer's importance; 0 makes every group block-dominant, inf makes every group layer-dominant,
            and None stands for the 25th percentile of the layer importances.
        priors: importances of blocks and layers; required if T > 0, ignored at T = 0.
    """
    if temperature == 0.0:
        return table
    assert priors is not None, "priors are needed at a temperature above 0"
    if tau is None:
        tau = float(np.percentile(list(priors.layer.values()), 25))
    prior = np.empty(len(table))
    for key, rows in table.blocks():
        of_layer = priors.layer[key.layer]
        prior[rows] = of_layer if of_layer < tau else priors.block[key]
    modulation = np.log1p(np.maximum(prior, 0.0)) ** temperature
    return replace(table, prior=prior, score=table.score * modulation)
