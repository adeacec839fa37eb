"""The removal costs of `obs` against brute force in fp64 on small blocks."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradprune.calibration.obs import RIDGE, removal_path, with_ridge


def block(
    groups: int, columns: int = 1, *, outputs: int = 5, tokens: int = 200, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A random weight [O, I], correlated inputs [tokens, I], and their Gram matrix with a ridge, all fp64."""
    generator = torch.Generator().manual_seed(seed)
    width = groups * columns
    mixed = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixed
    weight = torch.randn(outputs, width, generator=generator, dtype=torch.float64)
    return weight, x, with_ridge(x.T @ x / tokens, 0.01)


def least_increase(weight: Tensor, gram: Tensor, gone: list[int], columns: int) -> float:
    """1/2 min tr((W' - W) A (W' - W)^T) over W' without the columns of the groups `gone`, by numpy's SVD."""
    out = [column for group in gone for column in range(group * columns, (group + 1) * columns)]
    rest = [column for column in range(weight.shape[1]) if column not in out]
    root = np.linalg.cholesky(gram.numpy()).T
    target = root[:, out] @ weight.numpy()[:, out].T
    if not rest:
        return 0.5 * float((target**2).sum())
    found = np.linalg.lstsq(root[:, rest], target, rcond=None)[0]
    return 0.5 * float(((target - root[:, rest] @ found) ** 2).sum())


@pytest.mark.parametrize(
    ("groups", "columns"), [(1, 1), (3, 1), (9, 1), (37, 1), (100, 1), (3, 8), (5, 4), (20, 2), (64, 2)]
)
@pytest.mark.parametrize("seed", range(3))
def test_every_cost_along_the_path_is_the_increase_of_the_optimum(groups: int, columns: int, seed: int) -> None:
    weight, _, gram = block(groups, columns, seed=seed)
    path = removal_path(weight, gram, columns)
    assert sorted(path.order.tolist()) == list(range(groups))
    for count in range(1, groups + 1):
        expected = least_increase(weight, gram, path.order[:count].tolist(), columns)
        np.testing.assert_allclose(float(path.cost[:count].sum()), expected, rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_each_removed_group_is_the_cheapest_if_a_round_removes_one_group(seed: int) -> None:
    """Every other group that could have been removed next is tried by brute force."""
    weight, _, gram = block(9, seed=seed)
    order = removal_path(weight, gram, 1).order.tolist()
    for turn, group in enumerate(order):
        increases = {other: least_increase(weight, gram, [*order[:turn], other], 1) for other in order[turn:]}
        assert group == min(increases, key=increases.__getitem__)


def test_rounds_cost_little_more_than_the_best_of_all_subsets() -> None:
    lost = []
    for seed in range(10):
        weight, _, gram = block(8, seed=seed)
        path = removal_path(weight, gram, 1)
        best = min(least_increase(weight, gram, list(gone), 1) for gone in itertools.combinations(range(8), 3))
        lost.append(float(path.cost[:3].sum()) / best)
    assert min(lost) >= 1.0 - 1e-9
    assert np.median(lost) < 1.05


def test_cheap_groups_outside_a_round_are_removed_before_expensive_ones_inside() -> None:
    """Of 16 channels with large weights, which span 14 dimensions, two are free. The other 48 have small weights."""
    mixed = torch.randn(16, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = torch.eye(64, dtype=torch.float64)
    gram[:16, :16] = mixed @ mixed.T + 1e-9 * torch.eye(16)
    weight = torch.full((3, 64), 0.1, dtype=torch.float64)
    weight[:, :16] = 10.0
    order = removal_path(weight, gram, 1).order
    assert (order[:2] < 16).all()
    assert (order[2:50] >= 16).all()


@pytest.mark.parametrize("channels", [10, 64])
def test_twins_are_not_both_removed_before_an_independent_channel_of_the_same_cost(channels: int) -> None:
    """The first of two equal channels is removed for free; the other then carries both, at four times its own cost."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, channels, generator=generator, dtype=torch.float64)
    x[:, 1], x[:, 5] = x[:, 0], x[:, 4]
    weight = torch.ones(3, channels, dtype=torch.float64)
    order = removal_path(weight, with_ridge(x.T @ x / len(x), 1e-9), 1).order.tolist()
    assert {order[0], order[1]} <= {0, 1, 4, 5}
    assert len({order[0], order[1]} & {0, 1}) == len({order[0], order[1]} & {4, 5}) == 1
    for twins in ({0, 1}, {4, 5}):
        assert max(map(order.index, twins)) >= channels - 2


@pytest.mark.parametrize("groups", [12, 48])
def test_exact_combinations_are_free(groups: int) -> None:
    weight, x, _ = block(groups, tokens=400)
    planted = [2, 7, groups - 1]
    generator = torch.Generator().manual_seed(1)
    others = [group for group in range(groups) if group not in planted]
    mix = torch.randn(len(others), len(planted), generator=generator, dtype=torch.float64)
    x[:, planted] = x[:, others] @ mix
    path = removal_path(weight, with_ridge(x.T @ x / len(x), 1e-12), 1)
    scale = float(path.cost.sum())
    assert float(path.cost[:3].sum()) < 1e-9 * scale
    assert float(path.cost[3]) > 1e-6 * scale


def test_the_importance_sorts_into_the_paths_order_even_in_fp32() -> None:
    weight, x, _ = block(40, tokens=400)
    weight[:, 10:20] = 0.0  # equal costs of zero
    path = removal_path(weight, with_ridge(x.T @ x / len(x)), 1)
    importance = path.importance()
    for scale in (1.0, 1.7, 1e6):
        rounded = (scale * importance).float()
        assert rounded.argsort(stable=True).tolist() == path.order.tolist()
    along = importance[path.order].numpy()
    highest_so_far = np.maximum.accumulate(path.cost.numpy())
    np.testing.assert_allclose(along, highest_so_far, rtol=1e-4, atol=1e-35)


def test_curvature_and_powers_of_two_of_the_weights_scale_costs_and_keep_the_order() -> None:
    weight, _, gram = block(40)
    plain = removal_path(weight, gram, 1)
    scaled = removal_path(4.0 * weight, gram, 1, curvature=0.5)
    assert torch.equal(scaled.order, plain.order)
    torch.testing.assert_close(scaled.cost, 8.0 * plain.cost, rtol=1e-12, atol=0.0)


@settings(max_examples=25)
@given(groups=st.integers(2, 40), seed=st.integers(0, 99))
def test_permuting_channels_permutes_the_path(groups: int, seed: int) -> None:
    weight, _, gram = block(groups, seed=seed)
    shuffled = torch.randperm(groups, generator=torch.Generator().manual_seed(seed))
    plain = removal_path(weight, gram, 1)
    moved = removal_path(weight[:, shuffled], gram[shuffled][:, shuffled], 1)
    assert shuffled[moved.order].tolist() == plain.order.tolist()
    torch.testing.assert_close(moved.cost, plain.cost, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("groups", "columns", "outputs"), [(200, 1, 64), (172, 1, 64), (300, 1, 130), (4, 43, 130)])
def test_the_same_bytes_at_any_number_of_threads(
    groups: int, columns: int, outputs: int, restore_threads: None
) -> None:
    weight, _, gram = block(groups, columns, outputs=outputs, tokens=400)
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        path = removal_path(weight, gram, columns)
        found.append((path.order.tolist(), path.importance().tolist()))
    assert all(other == found[0] for other in found)


def test_a_path_needs_the_memory_that_is_planned() -> None:
    """At most two copies of the matrix beside the weights: any more would be the peak of a whole run."""
    pytest.importorskip("triton", reason="triton is not installed: what a removal path holds is NOT counted here")
    from benchmarks.predicted.counted import Counted

    outputs, width = 256, 2048
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, width, generator=generator) for rows in (width + 100, outputs))
    gram = x.T @ x
    with Counted() as counted:
        removal_path(weight, with_ridge(gram), 1, overwrite=True)
    assert counted.peak < 1.1 * 8 * width * (2 * width + outputs)


def test_a_ridge_makes_any_gram_matrix_positive_definite() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = x.T @ x
    with pytest.raises(ValueError, match="not positive definite; add a ridge"):
        removal_path(torch.ones(2, 8), torch.zeros(8, 8), 1)
    shifted = with_ridge(gram)
    torch.testing.assert_close(shifted - gram, RIDGE * gram.diagonal().mean() * torch.eye(8, dtype=torch.float64))
    assert torch.equal(with_ridge(torch.zeros(4, 4)), torch.eye(4, dtype=torch.float64))
    assert removal_path(torch.ones(2, 4), with_ridge(torch.zeros(4, 4)), 2).cost.tolist() == [2.0, 2.0]


def test_the_reach_comes_from_half_of_the_groups_that_still_write() -> None:
    """As after an earlier shot, a third of the groups is already removed; for the reach, half of the others are."""
    weight, _, gram = block(12, 2)
    weight[:, :8] = 0.0
    path = removal_path(weight, gram, 2)
    assert sorted(path.order[:4].tolist()) == [0, 1, 2, 3]
    assert path.num_removed == 8
    assert (path.cost[:4] == 0.0).all()
    assert (path.cost[4:8] > 0.0).all()
    silent = (path.partial_weight == 0.0).all(0).unflatten(0, (12, 2)).all(1)
    assert sorted(silent.nonzero().flatten().tolist()) == sorted(path.order[:8].tolist())
