from dataclasses import replace

import numpy as np
import pytest

from gradprune.config import Scoring
from gradprune.scoring.normalization import normalized_scores
from helpers.tables import make_table


def by_unit(table, per: str):
    units = table.layer if per == "layer" else table.layer * 2 + table.kind
    return [units == unit for unit in np.unique(units)]


FORMULAS = {
    "none": lambda x: x,
    "log": lambda x: np.log(1 + x / x.mean()),
    "sqrt": lambda x: np.sqrt(x / x.mean()),
    "minmax": lambda x: (x - x.min()) / (x.max() - x.min()),
    "zscore": lambda x: (x - x.mean()) / x.std(),
}


@pytest.mark.parametrize("per", ["layer", "block"])
@pytest.mark.parametrize("method", FORMULAS)
def test_scores_follow_the_formula(method: str, per: str) -> None:
    table = make_table()
    expected = table.importance / table.cost
    for rows in by_unit(table, per):
        expected[rows] = FORMULAS[method](expected[rows])
    if method == "zscore":
        expected -= expected.min()
    found = normalized_scores(table, Scoring(normalize_scores=method, normalize_per=per))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert found.min() >= 0.0


@pytest.mark.parametrize("method", ["log", "sqrt", "minmax", "zscore"])
def test_a_scaled_layer_scores_as_before(method: str) -> None:
    table = make_table()
    scaled = replace(table, importance=np.where(table.layer == 1, 1e-4 * table.importance, table.importance))
    before, after = (normalized_scores(t, Scoring(normalize_scores=method)) for t in (table, scaled))
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-12)
    assert not np.allclose(normalized_scores(scaled, Scoring()), normalized_scores(table, Scoring()))


def test_clipping_limits_outliers() -> None:
    table = make_table()
    importance = table.importance.copy()
    outlier = int(np.flatnonzero(table.layer == 0)[-1])
    importance[outlier] = 1e9
    found = normalized_scores(replace(table, importance=importance), Scoring(clip_percentile=90.0))
    rows = table.layer == 0
    low, high = np.percentile(importance[rows] / table.cost[rows], (10.0, 90.0))
    assert found[rows].max() == high < 1e8
    assert found[rows].min() == low


@pytest.mark.parametrize("method", FORMULAS)
def test_equal_and_zero_scores_stay_finite(method: str) -> None:
    table = make_table()
    for value in (0.0, 3.0):
        flat = replace(table, importance=value * table.cost.astype(float))
        found = normalized_scores(flat, Scoring(normalize_scores=method))
        assert np.isfinite(found).all()
        assert not found.any() or (value > 0.0 and method not in ("minmax", "zscore"))


def test_the_attention_factor_multiplies_kv_groups_only() -> None:
    table = make_table()
    plain, weighed = (normalized_scores(table, Scoring(attention_factor=f)) for f in (1.0, 2.5))
    np.testing.assert_array_equal(weighed, np.where(table.kind == 0, 2.5 * plain, plain))
