import dataclasses
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradprune.config import Constraints, PruneConfig
from gradprune.errors import ConfigError, SelectionError
from gradprune.models import describe
from gradprune.models.kinds import KIND_NAMES, BlockKey
from gradprune.scoring.selection import check_reachable, select
from gradprune.scoring.table import GroupTable, empty_table
from gradprune.surgery.cut import cut
from helpers.cut_models import random_masks
from helpers.tables import ATTENTION_COST, MLP_COST, make_table
from helpers.tiny_models import tiny_model


def widths(table: GroupTable, pruned: np.ndarray, kind: str) -> list[int]:
    of_kind = table.kind == KIND_NAMES.index(kind)
    return [int((~pruned[of_kind & (table.layer == layer)]).sum()) for layer in range(table.layers)]


def greedy(table: GroupTable, budget: float) -> np.ndarray:
    """The selection rule written out: sort by score, take each group that still fits the budget, skip any other."""
    pruned, spent = np.zeros(len(table), bool), 0
    rows = range(len(table))
    for row in sorted(rows, key=lambda r: (table.score[r], table.layer[r], table.kind[r], table.index[r])):
        if spent + table.cost[row] <= budget:
            pruned[row] = True
            spent += table.cost[row]
    return pruned


@given(ratio=st.floats(0.01, 0.95), seed=st.integers(0, 100), ties=st.booleans())
def test_selection_equals_the_plain_greedy_rule(ratio: float, seed: int, ties: bool) -> None:
    table = make_table(seed=seed)
    if ties:
        table = dataclasses.replace(table, score=np.floor(table.score / 7))
    parameters = int(table.cost.sum())
    pruned = select(table, ratio, parameters, Constraints())
    np.testing.assert_array_equal(pruned, greedy(table, ratio * parameters))


@given(
    ratio=st.floats(0.02, 0.6),
    seed=st.integers(0, 20),
    limit=st.sampled_from([1.0, 0.8]),
    round_to=st.sampled_from([1, 2, 4, 5]),
    uniform=st.booleans(),
)
def test_the_budget_is_kept_and_nearly_used(
    ratio: float, seed: int, limit: float, round_to: int, uniform: bool
) -> None:
    table = make_table(seed=seed)
    parameters = int(table.cost.sum())
    constraints = Constraints(max_layer_ratio=limit, round_to=round_to, uniform=uniform)
    try:
        pruned = select(table, ratio, parameters, constraints)
    except SelectionError:
        # This is right only if all that may be removed is less than the budget.
        assert limit < 1.0 or uniform
        assert ratio > 0.4
        return
    removed = int(table.cost[pruned].sum())
    assert removed <= ratio * parameters
    for layer in range(table.layers):
        of_layer = table.layer == layer
        assert table.cost[of_layer & pruned].sum() <= limit * table.cost[of_layer].sum() + 1e-9
    # What is left of the budget is less than the largest unit, unless a layer's limit prevents using it.
    unit = max(ATTENTION_COST, MLP_COST * round_to) * (table.layers if uniform else 1)
    assert limit < 1.0 or uniform or ratio * parameters - removed < unit


@pytest.mark.parametrize("round_to", [2, 4, 5, 8])
def test_round_to_makes_every_kept_width_a_multiple(round_to: int) -> None:
    table = make_table(channels=37)
    pruned = select(table, 0.3, int(table.cost.sum()), Constraints(round_to=round_to))
    kept = widths(table, pruned, "mlp")
    # A layer that lost nothing keeps its own width.
    assert all(width % round_to == 0 or width == 37 for width in kept)
    assert len(set(kept)) > 1


def test_round_to_removes_the_lowest_scoring_channels_of_a_layer() -> None:
    table = make_table(channels=37)
    pruned = select(table, 0.3, int(table.cost.sum()), Constraints(round_to=8))
    for layer in range(table.layers):
        channels = (table.layer == layer) & (table.kind == 1)
        if pruned[channels].any() and not pruned[channels].all():
            assert table.score[channels & pruned].max() < table.score[channels & ~pruned].min()


def test_ties_are_broken_by_the_lower_index() -> None:
    table = make_table(layers=1, heads=0, channels=64)
    score = table.index % 3.0
    pruned = select(replace(table, score=score), 0.5, int(table.cost.sum()), Constraints(round_to=8))
    np.testing.assert_array_equal(np.flatnonzero(pruned), np.sort(np.lexsort((table.index, score))[:32]))


def test_uniform_keeps_the_same_widths_everywhere() -> None:
    table = make_table(heads=4, channels=24)
    pruned = select(table, 0.35, int(table.cost.sum()), Constraints(uniform=True, round_to=4))
    heads, channels = set(widths(table, pruned, "attention")), set(widths(table, pruned, "mlp"))
    assert len(heads) == len(channels) == 1
    assert heads.pop() >= 1
    assert channels.pop() % 4 == 0


def test_uniform_keeps_each_layers_limit_if_layers_have_different_kinds_of_blocks() -> None:
    """The first layer has only an MLP, the last only attention; no layer may exceed its limit to make up for others."""
    whole = make_table(heads=4, channels=24)
    there = ~((whole.layer == 0) & (whole.kind == 0) | (whole.layer == 3) & (whole.kind == 1))
    columns = ("layer", "kind", "index", "cost", "score")
    table = replace(whole, **{name: getattr(whole, name)[there] for name in columns})
    parameters = int(table.cost.sum())
    for cheap in (0, 1):
        at = replace(table, score=np.where(table.kind == cheap, table.score / 1e6, table.score))
        pruned = select(at, 0.35, parameters, Constraints(uniform=True, max_layer_ratio=0.5))
        of_layers = np.bincount(at.layer, at.cost * pruned) / np.bincount(at.layer, at.cost)
        assert of_layers.max() <= 0.5
        assert pruned.any()


def test_a_limit_that_no_layer_reaches_changes_nothing() -> None:
    table = make_table(heads=4, channels=24)
    limited, free = (
        select(table, 0.4, int(table.cost.sum()), Constraints(uniform=True, max_layer_ratio=limit))
        for limit in (0.5, 1.0)
    )
    np.testing.assert_array_equal(limited, free)


def test_uniform_keeps_only_head_counts_the_architecture_can_state() -> None:
    table = make_table(heads=8, channels=24)
    for ratio in (0.2, 0.4, 0.6, 0.8):
        table = replace(table, plain_widths={"attention": frozenset({1, 2, 4, 8})})
        pruned = select(table, ratio, int(table.cost.sum()), Constraints(uniform=True))
        assert set(widths(table, pruned, "attention")) <= {1, 2, 4, 8}


def test_frozen_layers_stay_whole() -> None:
    table = make_table()
    pruned = select(table, 0.4, int(table.cost.sum()), Constraints(freeze_first_n_layers=1, freeze_last_n_layers=1))
    assert not pruned[(table.layer == 0) | (table.layer == 3)].any()
    assert pruned.any()


@pytest.mark.parametrize("constraints", [Constraints(freeze_first_n_layers=2), Constraints(max_layer_ratio=0.5)])
@pytest.mark.parametrize("ratio", [0.9, 0.51])
def test_a_ratio_the_constraints_forbid_says_what_is_possible(ratio: float, constraints: Constraints) -> None:
    table = make_table()
    with pytest.raises(SelectionError, match=rf"pruning_ratio: {ratio} cannot be reached.*0\.5000 of the model"):
        select(table, ratio, int(table.cost.sum()), constraints)


def test_everything_outside_the_frozen_layers_may_be_removed() -> None:
    table = make_table()
    pruned = select(table, 0.5, int(table.cost.sum()), Constraints(freeze_first_n_layers=2))
    np.testing.assert_array_equal(pruned, table.layer >= 2)


def test_removing_everything_is_refused() -> None:
    table = make_table()
    with pytest.raises(SelectionError, match="cannot be reached"):
        select(table, 0.5, int(table.cost.sum()) * 2, Constraints())


def test_whole_blocks_may_be_removed() -> None:
    table = make_table()
    score = np.where((table.layer == 1) & (table.kind == 0), -1.0, table.score)
    pruned = select(dataclasses.replace(table, score=score), 0.3, int(table.cost.sum()), Constraints())
    assert widths(table, pruned, "attention")[1] == 0


def test_epsilon_drops_thin_layers_whole() -> None:
    table = make_table(layers=3, heads=2, channels=10)
    score = np.where(table.layer == 1, table.score - 1000.0, table.score)
    table = dataclasses.replace(table, score=score)
    most_of_layer_1 = 0.9 * table.cost[table.layer == 1].sum() / table.cost.sum()
    parameters = int(table.cost.sum())
    kept = select(table, most_of_layer_1, parameters, Constraints(epsilon=0.0))
    dropped = select(table, most_of_layer_1, parameters, Constraints(epsilon=0.6))
    assert not kept[table.layer == 1].all()
    assert dropped[table.layer == 1].all()
    np.testing.assert_array_equal(kept[table.layer != 1], dropped[table.layer != 1])
    # A layer that keeps exactly epsilon is not removed.
    fraction = float(np.mean([1.0 - kept[(table.layer == 1) & (table.kind == kind)].mean() for kind in (0, 1)]))
    np.testing.assert_array_equal(kept, select(table, most_of_layer_1, parameters, Constraints(epsilon=fraction)))


def test_a_layer_that_keeps_exactly_an_epsilon_of_a_tenth_stays() -> None:
    table = make_table(layers=2, heads=10, channels=10)
    going = table.layer == 1
    for kind in (0, 1):
        going[np.flatnonzero(going & (table.kind == kind))[0]] = False
    table = dataclasses.replace(table, score=np.where(going, -1.0, 1.0))
    parameters = int(table.cost.sum())
    ratio = float(table.cost[going].sum()) / parameters
    np.testing.assert_array_equal(select(table, ratio, parameters, Constraints(epsilon=0.1)), going)
    dropped = select(table, ratio, parameters, Constraints(epsilon=0.11))
    np.testing.assert_array_equal(dropped, table.layer == 1)


def test_epsilon_is_not_checked_before_scores_are_known() -> None:
    table = make_table()
    arguments = table, 0.3, int(table.cost.sum()), Constraints(epsilon=1.0)
    with pytest.raises(SelectionError, match="epsilon: 1 would remove every layer"):
        select(*arguments)
    check_reachable(*arguments)


def without(table: GroupTable, rows: np.ndarray) -> GroupTable:
    """The table without the given rows, a boolean mask."""
    columns = {name: values[~rows] for name, values in vars(table).items() if isinstance(values, np.ndarray)}
    return replace(table, **columns)


def test_uniform_needs_layers_of_one_width() -> None:
    table = make_table()
    uneven = without(table, np.arange(len(table)) == 0)
    with pytest.raises(ConfigError, match=r"uniform: .* attention widths: \[2, 3\]"):
        select(uneven, 0.2, int(table.cost.sum()), Constraints(uniform=True))


def test_uniform_ignores_layers_that_never_had_a_block() -> None:
    table = make_table(heads=4, channels=24)
    hybrid = without(table, (table.kind == 0) & (table.layer % 2 == 0))
    pruned = select(hybrid, 0.4, int(hybrid.cost.sum()), Constraints(uniform=True))
    none, some, nothing, same = widths(hybrid, pruned, "attention")
    assert none == nothing == 0
    assert some == same > 0
    assert len(set(widths(hybrid, pruned, "mlp"))) == 1


def test_uniform_names_the_blocks_that_an_earlier_pruning_removed() -> None:
    model = tiny_model(layers=3)
    masks = random_masks(model, 2.0)
    masks[BlockKey(1, "attention")][:] = False
    table = empty_table(describe(cut(model, masks)))
    message = "uniform: an earlier pruning removed the attention block of 1 layer of this model"
    with pytest.raises(ConfigError, match=message):
        select(table, 0.2, int(table.cost.sum()), Constraints(uniform=True))
    assert select(table, 0.2, int(table.cost.sum()), Constraints()).any()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_costs_are_the_numbers_of_removed_parameters(architecture: str) -> None:
    model = tiny_model(architecture, kv_heads=2, ratio=3, channels=5)
    config = model.config
    table = empty_table(describe(model))
    bias = 1 if architecture == "qwen2" else 0
    attention = (3 + 1 + 1) * 4 * (config.hidden_size + bias) + 3 * 4 * config.hidden_size
    assert set(table.cost[table.kind == 0]) == {attention}
    assert set(table.cost[table.kind == 1]) == {3 * config.hidden_size}
    assert len(table) == 3 * (2 + 5)


@given(st.integers(0, 3))
def test_selection_is_linear_in_the_number_of_groups(seed: int) -> None:
    """A 7B model has 350 thousand groups; a quadratic rule would take minutes."""
    table = make_table(layers=32, heads=32, channels=3000, seed=seed)
    start = time.perf_counter()
    select(table, 0.3, int(table.cost.sum()), Constraints())
    assert time.perf_counter() - start < 5.0


def test_constraints_come_from_the_config() -> None:
    config = PruneConfig(round_to=8, max_layer_ratio=0.5, epsilon=0.1, freeze_first_n_layers=2)
    constraints = config.constraints
    assert (constraints.round_to, constraints.max_layer_ratio) == (8, 0.5)
    assert (constraints.epsilon, constraints.freeze_first_n_layers) == (0.1, 2)
