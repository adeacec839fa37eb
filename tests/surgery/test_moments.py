"""The repair's least-squares problems against errors that are computed from the same tokens one by one."""

import pytest
import torch

from gradprune.errors import NonFiniteError
from gradprune.ranks import ALONE, Ranks
from gradprune.surgery.moments import Moments, MomentSums, Problem


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_errors_equal_those_computed_token_by_token(blend: float) -> None:
    w, x, z, columns = drawn(5, 8), drawn(40, 8), drawn(40, 5), torch.tensor([0, 2, 3, 7])
    sums = MomentSums(w, aimed=True)
    sums.add(x[:30], z[:30])
    sums.add(x[30:], z[30:])
    problem = sums.total(ALONE, "w").of_output(w, columns, blend)
    target, change = (1.0 - blend) * x @ w.T + blend * z, drawn(5, 4)

    def error(weight: torch.Tensor) -> float:
        return ((target - x[:, columns] @ weight.T).square().sum() / target.square().sum()).item()

    assert problem.error_before == pytest.approx(error(w[:, columns]), rel=1e-10)
    assert problem.error(change) == pytest.approx(error(w[:, columns] + change), rel=1e-10)


def test_equal_columns_that_do_not_factor_share_the_change() -> None:
    twins = Problem(torch.ones(2, 2).double(), torch.tensor([[3.0, 3.0]]).double(), *torch.ones(2).double())
    torch.testing.assert_close(twins.solution(0.0), torch.tensor([[1.5, 1.5]]).double(), rtol=1e-6, atol=0.0)


def test_a_target_that_is_not_finite_is_reported() -> None:
    sums = MomentSums(drawn(5, 8), aimed=True)
    sums.add(drawn(40, 8), drawn(40, 5) / 0.0)
    with pytest.raises(NonFiniteError, match="repair: what w should write is not finite"):
        sums.total(ALONE, "w")


class _Second(Ranks):
    """The second of two ranks; `first` is what the first one adds, in order, and `given` what this one does."""

    def __init__(self, first: list[torch.Tensor]) -> None:
        self._first, self.given = iter(first), []

    def sum(self, own: torch.Tensor) -> torch.Tensor:
        self.given.append(own.clone())
        return own + next(self._first, 0.0)


def test_moments_are_those_of_the_tokens_of_all_ranks() -> None:
    w, x, z = drawn(5, 8), drawn(40, 8), drawn(40, 5)

    def moments(tokens: slice, ranks: Ranks) -> Moments:
        sums = MomentSums(w, aimed=True)
        sums.add(x[tokens], z[tokens])
        return sums.total(ranks, "w")

    one = _Second([])
    moments(slice(0, 30), one)
    found = moments(slice(30, 40), _Second(one.given))
    torch.testing.assert_close(found.gram, x.T @ x)
    torch.testing.assert_close(found.cross, z.T @ x)
    torch.testing.assert_close(found.square, z.square().sum())
