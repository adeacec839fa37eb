"""Targets: the pruned model has the requested size or speed, and no more is pruned than that requires."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradprune import PruneConfig, prune, target
from gradprune.config import Constraints, count_of
from gradprune.errors import ConfigError, SelectionError
from gradprune.evaluation.size import model_size
from gradprune.evaluation.speed import Throughput
from gradprune.models import describe
from gradprune.scoring.choose import Choice
from gradprune.scoring.selection import select
from helpers.tables import make_table
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_model

TOKENS = torch.randint(61, (900,), generator=torch.Generator().manual_seed(0))
OPTIONS = {
    "num_samples": 8, "held_out_samples": 4, "seq_len": 12, "batch_size": 4, "measure_speed": False,
    "repair": "none", "device": "cpu",
}  # fmt: skip


def pruned(model, **options):
    return prune(model, None, PruneConfig(**OPTIONS, **options), calibration=TOKENS, evaluation=TOKENS[:120])


def largest_group(model) -> int:
    return max(block.cost for block in describe(model).with_groups().blocks)


@pytest.mark.parametrize(
    ("written", "number"), [("350M", 350_000_000), ("1.5B", 1_500_000_000), ("12 k", 12_000), ("7", 7)]
)
def test_counts_may_have_suffixes(written: str, number: int) -> None:
    assert count_of(written) == number


@pytest.mark.parametrize("wrong", ["0", "0.1", "many", "-3M", "3MiB", ""])
def test_invalid_counts_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"target_parameters: .* is not a number such as 350M"):
        PruneConfig(target_parameters=wrong)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
@pytest.mark.parametrize("share", [0.75, 0.9])
def test_a_number_of_parameters_is_met_to_within_a_few_groups(architecture: str, share: float) -> None:
    model = tiny_model(architecture, dtype=torch.float32)
    wanted = int(share * model_size(model).parameters)
    result = pruned(model, target_parameters=str(wanted))
    left = model_size(result.model).parameters
    # A selection falls short of its ratio by up to a group, so the ratio that meets the target may exceed it by up to a
    # group, and by another half because it is found by bisection; norms of dropped blocks are removed, too.
    assert wanted - 3 * largest_group(model) < left <= wanted
    # The configuration of the result has the ratio that meets the target.
    again = pruned(model, pruning_ratio=result.config.pruning_ratio)
    assert model_size(again.model).parameters == left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_of_bytes_is_met_to_within_a_few_groups(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    wanted = int(0.8 * model_size(model).bytes)
    left = model_size(pruned(model, target_bytes=str(wanted)).model).bytes
    assert wanted - 3 * largest_group(model) * dtype.itemsize < left <= wanted


def test_with_rounded_widths_too_much_is_removed_rather_than_too_little() -> None:
    model = tiny_model(channels=40, dtype=torch.float32)
    wanted = int(0.8 * model_size(model).parameters)
    assert model_size(pruned(model, target_parameters=str(wanted), round_to=16).model).parameters <= wanted


def test_no_more_is_removed_than_needed_if_groups_are_removed_together() -> None:
    """With equal widths, a channel of every layer or a KV head of every layer is removed at the same time."""
    model = tiny_model(channels=40, layers=4, dtype=torch.float32)
    wanted = int(0.8 * model_size(model).parameters)
    result = pruned(model, target_parameters=str(wanted), uniform=True)
    left = model_size(result.model).parameters
    assert left <= wanted
    # A slightly smaller ratio would miss the target.
    least = min(block.cost for block in describe(model).blocks) / model_size(model).parameters
    smaller = pruned(model, pruning_ratio=result.config.pruning_ratio - least, uniform=True)
    assert model_size(smaller.model).parameters > wanted


def test_a_search_meets_the_target() -> None:
    model = tiny_model(dtype=torch.float32)
    wanted = int(0.8 * model_size(model).parameters)
    result = pruned(model, target_parameters=str(wanted), importance_method="auto", search_minutes=0.02)
    assert result.search is not None
    assert model_size(result.model).parameters <= wanted


def test_a_size_that_the_model_already_has_is_refused() -> None:
    model = tiny_model(dtype=torch.float32)
    size = model_size(model)
    with pytest.raises(SelectionError, match=rf"target_parameters: .* no less .* {size.parameters:,} parameters"):
        pruned(model, target_parameters=str(size.parameters))
    with pytest.raises(SelectionError, match=rf"target_bytes: .* {size.bytes:,} bytes"):
        pruned(model, target_bytes=str(size.bytes))


def test_a_target_that_constraints_do_not_allow_is_refused_before_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradprune.pipeline.gather_evidence", lambda *_: pytest.fail("it calibrates"))
    with pytest.raises(SelectionError, match=r"target_parameters: 200 cannot be met; .*cannot be reached"):
        pruned(tiny_model(dtype=torch.float32), target_parameters="200")


@given(seed=st.integers(0, 1000), share=st.floats(0.6, 0.99), round_to=st.sampled_from([1, 4, 8]))
def test_a_target_near_all_that_can_be_removed_is_met_or_out_of_reach(seed: int, share: float, round_to: int) -> None:
    """A ratio that meets a possible target is found, even if the first one tried is more than can be removed."""
    table = make_table(layers=2, heads=2, channels=12, seed=seed)
    parameters, constraints = int(table.cost.sum()) + 30, Constraints(round_to=round_to)

    def chosen(ratio: float) -> Choice:
        return Choice(table, select(table, ratio, parameters, constraints))

    def removed_at(ratio: float) -> float:
        try:
            return table.cost[chosen(ratio).pruned].sum() / parameters
        except SelectionError:
            return 0.0

    reached = share * max(removed_at(ratio) for ratio in np.linspace(0.5, 1.0, 200))
    ratio = target._ratio_for_size(chosen, reached, parameters)
    assert ratio is not None
    assert removed_at(ratio) >= reached
    assert target._ratio_for_size(chosen, table.cost.sum() / parameters - 1e-6, parameters) is None


def test_only_one_valid_target_can_be_given() -> None:
    with pytest.raises(ConfigError, match="target_bytes: target_parameters is given too"):
        PruneConfig(target_parameters="3M", target_bytes="3MiB")
    for value in (1.0, float("inf")):
        with pytest.raises(ConfigError, match=r"target_speedup: .* above 1"):
            PruneConfig(target_speedup=value)


def test_a_target_speed_gives_the_smallest_ratio_that_was_measured_to_be_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[float] = []

    def measured_by_size(models, **_options):
        """Report throughputs that are inversely proportional to the sizes of the models."""
        sizes = {name: float(model_size(model).parameters) for name, model in models.items()}
        measured.append(sizes["dense"] / sizes["pruned"])
        return {name: Throughput(1 / size, 1 / size, 1 / size) for name, size in sizes.items()}

    monkeypatch.setattr(target, "throughput", measured_by_size)
    model = tiny_model(channels=64, dtype=torch.float32)
    result = pruned(model, target_speedup=1.25)
    # A fifth is removed, give or take 1/128 and a group.
    assert result.config.pruning_ratio == pytest.approx(0.2, abs=0.03)
    assert model_size(model).parameters / model_size(result.model).parameters >= 1.25
    assert any(each < 1.25 for each in measured)
    with pytest.raises(
        SelectionError, match=r"target_speedup: 50 cannot be reached; .* \d+\.\d\d times as fast on cpu"
    ):
        pruned(model, target_speedup=50.0)


def test_a_target_speed_can_be_measured_and_reached_on_this_machine() -> None:
    """The model consists almost only of its layers, so that it becomes faster when they become narrower."""
    model = tiny_model(hidden=128, channels=2048, dtype=torch.float32)
    result = pruned(model, target_speedup=1.2)
    assert 0.0 < result.config.pruning_ratio < 0.9
