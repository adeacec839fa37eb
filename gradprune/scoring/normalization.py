"""Score normalisation: make the scores of different layers comparable, as an alternative to scaling gradients.

A score is a group's importance per parameter. Each layer (or each block) is normalised by itself; with x its scores:

- `none`: x;
- `log`: ln(1 + x / mean);
- `sqrt`: sqrt(x / mean);
- `minmax`: (x - min) / (max - min);
- `zscore`: (x - mean) / std; then the smallest value of the whole model is subtracted everywhere, because H-GSP
  multiplies scores and needs them non-negative.

Before that, scores may be clipped at a percentile p of their layer (block) and at 100 - p, so that single outliers do
not set the scale. A layer (block) whose scores are all equal gets 0 from `minmax` and `zscore`; one whose mean is 0
keeps its zeros.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gradprune.config import Normalize, Scoring
from gradprune.models import KINDS
from gradprune.scoring.table import GroupTable

Values = NDArray[np.float64]


def normalized_scores(table: GroupTable, scoring: Scoring) -> Values:
    """Return every group's importance per parameter, clipped and normalised: [len(table)] fp64, never negative.

    Args:
        table: the groups with their importances.
        scoring: how to clip and normalise; at the end, scores of KV groups are multiplied by its `attention_factor`.
    """
    scores: Values = table.importance / table.cost
    unit = table.layer if scoring.normalize_per == "layer" else table.layer * len(KINDS) + table.kind
    for value in np.unique(unit):
        rows = unit == value
        scores[rows] = _METHODS[scoring.normalize_scores](_clipped(scores[rows], scoring.clip_percentile))
    if scoring.normalize_scores == "zscore":
        scores -= scores.min()
    for number, kind in enumerate(KINDS):
        if kind.factor is not None:
            scores[table.kind == number] *= getattr(scoring, kind.factor)
    return scores


def _clipped(x: Values, percentile: float) -> Values:
    if percentile == 100.0:
        return x
    lowest, highest = np.percentile(x, (100.0 - percentile, percentile))
    return x.clip(lowest, highest)


def _relative(x: Values) -> Values:
    mean = x.mean()
    return x / mean if mean > 0.0 else x


def _spread(x: Values, centre: np.float64, width: np.float64) -> Values:
    return (x - centre) / width if width > 0.0 else np.zeros_like(x)


_METHODS: dict[Normalize, Callable[[Values], Values]] = {
    "none": lambda x: x,
    "log": lambda x: np.log1p(_relative(x)),
    "sqrt": lambda x: np.sqrt(_relative(x)),
    "minmax": lambda x: _spread(x, x.min(), x.max() - x.min()),
    "zscore": lambda x: _spread(x, x.mean(), x.std()),
}
