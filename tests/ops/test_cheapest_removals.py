"""Groups removed one by one, against least squares solved from scratch in fp64 for each removal."""

import mmap
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: its kernels are NOT tested here")

from gradprune.kernels.cheapest_removals import MOST_COLUMNS
from gradprune.ops import Removals, cheapest_removals
from helpers.devices import require_backend

SHAPES = [(1, 1, 1), (2, 1, 2), (9, 1, 4), (33, 1, 33), (130, 1, 40), (3, 4, 3), (12, 3, 5)]
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])


def problem(groups: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the Gram matrix A [I, I] of correlated inputs and a random weight [O, I], both fp64."""
    generator = torch.Generator().manual_seed(seed)
    width = groups * columns
    x = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    return x.T @ x / len(x), torch.randn(5, width, generator=generator, dtype=torch.float64)


def removed(gram: Tensor, weight: Tensor, columns: int, count: int, backend: str, device: str) -> Removals:
    arguments = (matrix.to(device) for matrix in (torch.linalg.inv(gram), weight.T @ weight))
    return cheapest_removals(*arguments, columns, count, backend)


def increase(gram: Tensor, weight: Tensor, out: Tensor) -> float:
    """Return by how much the least squares error grows without the columns `out`, from the Schur complement."""
    rest = torch.tensor([k for k in range(len(gram)) if k not in out.tolist()], dtype=torch.int64)
    across = gram[out[:, None], rest]
    left = gram[out[:, None], out] - across @ torch.linalg.solve(gram[rest[:, None], rest], across.T)
    return float((weight[:, out] @ left * weight[:, out]).sum())


@BACKENDS
@pytest.mark.parametrize(("groups", "columns", "count"), SHAPES)
def test_each_removal_is_the_cheapest_and_costs_what_least_squares_loses(
    groups: int, columns: int, count: int, backend: str, device: str
) -> None:
    require_backend(backend, device)
    gram, weight = problem(groups, columns)
    found = removed(gram, weight, columns, count, backend, device)
    before, out = 0.0, torch.empty(0, dtype=torch.int64)
    left = list(range(groups))
    for group, cost in zip(found.taken.tolist(), found.costs.tolist(), strict=True):
        at = {other: torch.cat([out, other * columns + torch.arange(columns)]) for other in left}
        costs = {other: increase(gram, weight, of_other) - before for other, of_other in at.items()}
        assert cost == pytest.approx(costs[group], rel=1e-8)
        assert costs[group] <= min(costs.values()) * (1 + 1e-8)
        before, out = before + costs[group], at[group]
        left.remove(group)


@BACKENDS
def test_ties_are_broken_by_the_lower_index(backend: str, device: str) -> None:
    require_backend(backend, device)
    eye = torch.eye(40, dtype=torch.float64)
    weight = torch.ones(1, 40, dtype=torch.float64)
    weight[0, [3, 30]] = 0.5
    found = removed(eye, weight, 1, 5, backend, device)
    assert found.taken.tolist() == [3, 30, 0, 1, 2]
    assert found.costs.tolist() == [0.25, 0.25, 1.0, 1.0, 1.0]


@BACKENDS
def test_no_removals_and_strided_matrices(backend: str, device: str) -> None:
    require_backend(backend, device)
    gram, weight = problem(9, 1)
    none = removed(gram, weight, 1, 0, backend, device)
    assert none.taken.shape == none.costs.shape == (0,)
    inverse, square = (matrix.to(device) for matrix in (torch.linalg.inv(gram), weight.T @ weight))
    expected = cheapest_removals(inverse, square, 1, 4, backend)
    for gaps in (
        lambda: torch.zeros(18, 20, dtype=torch.float64, device=device)[::2, :9],
        lambda: torch.zeros(9, 18, dtype=torch.float64, device=device).T[::2],
    ):
        found = cheapest_removals(gaps().copy_(inverse), gaps().copy_(square), 1, 4, backend)
        assert torch.equal(found.taken, expected.taken)
        assert torch.equal(found.costs, expected.costs)


@BACKENDS
def test_the_same_bits_twice(backend: str, device: str) -> None:
    require_backend(backend, device)
    gram, weight = problem(70, 1)
    first, second = (removed(gram, weight, 1, 50, backend, device) for _ in range(2))
    assert torch.equal(first.taken, second.taken)
    assert torch.equal(first.costs, second.costs)


def test_more_columns_than_one_triton_program_holds(device: str) -> None:
    gram, weight = problem(MOST_COLUMNS + 6, 1)
    expected = removed(gram, weight, 1, 12, "reference", device)
    found = removed(gram, weight, 1, 12, "auto", device)
    assert torch.equal(found.taken, expected.taken)
    torch.testing.assert_close(found.costs, expected.costs, rtol=1e-9, atol=0.0)


@BACKENDS
def test_wrong_arguments_are_named(backend: str, device: str) -> None:
    require_backend(backend, device)
    eye = torch.eye(6, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=r"gram: has shape \(5, 5\)"):
        cheapest_removals(eye, eye[:5, :5], 1, 1, backend)
    with pytest.raises(ValueError, match=r"inverse: dtype torch.float32; torch.float64 is needed"):
        cheapest_removals(eye.float(), eye, 1, 1, backend)
    with pytest.raises(ValueError, match="columns: 4 does not divide the 6 columns"):
        cheapest_removals(eye, eye, 4, 1, backend)
    with pytest.raises(ValueError, match="count: 4 of 3 groups cannot be removed"):
        cheapest_removals(eye, eye, 2, 4, backend)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is known to map memory without reserving it")
@BACKENDS
def test_row_strides_may_exceed_32_bits(backend: str) -> None:
    """The matrices are views into 34 GB of mapped, otherwise unused memory: an index that overflows reads zeros."""
    require_backend(backend, "cpu")
    apart, half, no_reserve = 2**30 + 5, 2**31, 0x4000
    gram, weight = problem(3, 1)
    matrices = torch.linalg.inv(gram), weight.T @ weight
    mapped = mmap.mmap(-1, 8 * (2 * half + 64), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    memory = torch.frombuffer(mapped, dtype=torch.float64)
    views = [
        memory.as_strided((3, 3), (apart, 1), start).copy_(matrix)
        for start, matrix in zip((half, half + 8), matrices, strict=True)
    ]
    expected = cheapest_removals(*matrices, 1, 3, backend)
    found = cheapest_removals(*views, 1, 3, backend)
    assert torch.equal(found.taken, expected.taken)
    assert torch.equal(found.costs, expected.costs)
