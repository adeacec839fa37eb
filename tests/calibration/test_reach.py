"""How far a block's error reaches the predictions; `test_engine` checks a dense model's reach, by the oracle."""

import pytest
import torch

from gradprune.calibration.reach import Followed, reaches
from gradprune.models import BlockKey, describe
from gradprune.models.experts import ExpertsBlock
from gradprune.models.footprint import FOLLOWED_SHARE, samples_followed
from gradprune.ranks import ALONE, Ranks
from helpers.mixtures import MIXTURES, experts_of, tiny_mixture
from helpers.oracle import divergence
from helpers.tiny_models import tiny_ids, tiny_model

A, B, C, D = (BlockKey(layer, "mlp") for layer in range(4))


def pruned_experts(block: ExpertsBlock) -> list[torch.Tensor]:
    """The experts' output projections [O, I], without their first three channels."""
    weights = [block.down.weight(expert).clone() for expert in range(block.experts)]
    for weight in weights:
        weight[:, :3] = 0.0
    return weights


@pytest.mark.parametrize("architecture", MIXTURES)
@torch.no_grad()
def test_divergences_of_experts_equal_those_of_a_changed_model(architecture: str) -> None:
    model, ids = tiny_mixture(architecture).double(), tiny_ids(40, 16)
    view = describe(model)
    followed, solved = Followed(view, list(ids.split(3)), ALONE), {}
    for block in view.blocks:
        of_experts = isinstance(block, ExpertsBlock)
        solved[block.key] = pruned_experts(block) if of_experts else [0.5 * block.output.weight]
    for layer in range(len(view.layers)):
        followed.pass_layer(layer, solved)
    found = followed.divergences()
    assert list(found) == [block.key for block in view.blocks]
    for block in view.blocks:
        if isinstance(block, ExpertsBlock):
            with block.writing_by(solved[block.key]):
                changed = block.down.parameter.clone()
            name = next(name for name, own in model.named_parameters() if own is block.down.parameter)
            expected = divergence(model, ids[: samples_followed(40, len(view.blocks))], name, changed)
            assert found[block.key] == pytest.approx(expected, rel=1e-6)
            assert block.down.parameter is experts_of(model)[block.layer].down_proj


@torch.no_grad()
def test_ranks_that_share_the_blocks_find_what_one_process_finds() -> None:
    view, ids = describe(tiny_model(dtype=torch.float64)), tiny_ids(6, 10)
    solved = {block.key: [0.5 * block.output.weight] for block in view.blocks}

    class Rank(Ranks):
        """One of two ranks; both write what they found to the same list and read it there."""

        world = 2

        def __init__(self, rank: int, found: list[list[float]]) -> None:
            self.rank, self._found = rank, found

        def gather_json(self, value: list[float]) -> list[list[float]]:
            self._found[self.rank] = value
            return self._found

    found: list[list[float]] = [[], []]
    by_rank = []
    for ranks in (ALONE, Rank(0, found), Rank(1, found)):
        followed = Followed(view, [ids], ranks)
        for layer in range(len(view.layers)):
            followed.pass_layer(layer, solved)
        try:
            by_rank.append(followed.divergences())
        except IndexError:
            # Rank 1 has not run yet, so its results are missing.
            assert ranks.rank == 0
    assert by_rank[0] == by_rank[1]


@pytest.mark.parametrize(
    ("samples", "blocks", "followed"), [(256, 60, 4), (128, 64, 2), (1, 60, 1), (8, 4, 2), (64, 1, 64)]
)
def test_as_many_samples_are_followed_as_take_a_sixth_of_a_pass(samples: int, blocks: int, followed: int) -> None:
    """They are at least two, and no more than there are."""
    assert samples_followed(samples, blocks) == followed
    if 2 < followed < samples:
        assert followed * blocks / 2 <= FOLLOWED_SHARE * 3 * samples < (followed + 1) * blocks / 2


def test_reach_is_relative_to_the_median_of_the_kind() -> None:
    other = BlockKey(0, "attention")
    divergences = {A: 2.0, B: 4.0, C: 12.0, other: 5.0}
    costs = dict.fromkeys((A, B, C), (2.0, 9.0)) | {other: (1.0, 3.0)}
    assert reaches(divergences, costs) == {A: 0.5, B: 1.0, C: 3.0, other: 1.0}


def test_a_reach_that_cannot_be_measured_is_one() -> None:
    """If the removed half costs or changes nothing, rounding errors would decide; divergences may overflow, too."""
    overflown = BlockKey(4, "mlp")
    divergences = {A: 1e-20, B: 4.0, C: 8.0, D: 0.0, overflown: float("inf")}
    costs = {A: (1e-12, 1.0), B: (1.0, 2.0), C: (1.0, 2.0), D: (1.0, 2.0), overflown: (1.0, 2.0)}
    found = reaches(divergences, costs)
    assert (found[A], found[D], found[overflown]) == (1.0, 1.0, 1.0)
    assert found[C] == 2.0 * found[B]
