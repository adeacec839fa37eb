"""The arithmetic of the repair: sums over tokens, and the weights that fit them best by least squares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from gradprune.accumulation import accumulation_dtype
from gradprune.calibration.cholesky import cholesky, solve
from gradprune.calibration.gram import GramSum, add_product, require_finite
from gradprune.ranks import Ranks

_MAX_RIDGE = 1e4


class MomentSums:
    """Accumulates `Moments` batch by batch, on the projection's device, in fp32 (fp64 for fp64 weights)."""

    def __init__(self, weight: Tensor, *, aimed: bool) -> None:
        """weight: the projection's, [O, I]; aimed: whether there is a wanted output z."""
        dtype = accumulation_dtype(weight)
        self._gram = GramSum(weight)
        self._cross = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        self._square = torch.zeros((), dtype=dtype, device=weight.device)
        self._aimed = aimed

    def add(self, x: Tensor, z: Tensor | None) -> None:
        """Add a batch: the projection's inputs x, [..., I], and wanted outputs z, [..., O]; None if there are none."""
        rows = self._gram.add(x)
        if z is not None:
            z = z.to(rows.device).flatten(0, -2)
            add_product(self._cross, z, rows)
            z = z.to(self._cross.dtype)
            self._square += _dot(z, z)

    def total(self, ranks: Ranks, name: str) -> "Moments":
        """Return the sums over the tokens of all ranks. To be called last, because it frees this rank's sums.

        Args:
            ranks: the processes that divide the batches; all of them make this call.
            name: the projection's, for error messages.

        Raises:
            NonFiniteError: an input or a wanted output is NaN or infinite.
        """
        gram = self._gram.total(ranks, "repair", name)
        cross, square = self._cross, self._square
        del self._cross, self._square
        if self._aimed:
            cross, square = ranks.sum(cross), ranks.sum(square)
            require_finite(square, f"repair: what {name} should write")
        return Moments(gram, cross, square)


@dataclass(frozen=True)
class Moments:
    """Sums over tokens of products of a projection's input, x [I], and its wanted output, z [O].

    gram: [I, I], x x^T. cross: [O, I], z x^T. square: [], ||z||^2. The last two are zero if there is no wanted output.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor

    def of_output(self, weight: Tensor, columns: Tensor, blend: float) -> "Problem":
        """The problem for the kept columns ([K] int64) of a weight W [O, I], with the target W x + blend (z - W x)."""
        lost = _others(columns, weight.shape[1])
        start, cut = weight[:, columns].double(), weight[:, lost].double()
        gram, cross = self.gram[columns[:, None], columns], self.cross.double()
        # The kept columns of W G, as the parts that the kept and the lost columns of W contribute.
        of_kept, of_lost = start @ gram.double(), cut @ self.gram[lost[:, None], columns].double()
        own = _dot(of_kept, start) + 2.0 * _dot(of_lost, start)
        own += _dot(cut @ self.gram[lost[:, None], lost].double(), cut)
        square = (
            (1.0 - blend) ** 2 * own
            + 2.0 * blend * (1.0 - blend) * _dot(cross, weight.double())
            + blend**2 * self.square.double()
        )
        missing = torch.lerp(of_lost, cross[:, columns] - of_kept, blend)
        rest = square - _dot(start, of_kept) - 2.0 * _dot(start, missing)
        return Problem(gram, missing, square, rest)


@dataclass(frozen=True)
class Problem:
    """The problem to find the change D of a weight W, both [O, K], that minimises the sum of ||t - (W + D) x||^2.

    All its fields are sums over tokens, too.
    gram: [K, K], x x^T, in the dtype it was summed in, which is precise enough for the error. missing: [O, K] fp64,
    (t - W x) x^T. square: [] fp64, ||t||^2. rest: [] fp64, ||t - W x||^2.
    """

    gram: Tensor
    missing: Tensor
    square: Tensor
    rest: Tensor

    @cached_property
    def unit(self) -> Tensor:
        """The mean of the Gram matrix's diagonal, which ridges are relative to."""
        return self.gram.diagonal().double().mean().clamp_min(torch.finfo(torch.float64).tiny)

    @property
    def error_before(self) -> float:
        """The relative error of the unchanged weight, sum ||t - W x||^2 / sum ||t||^2."""
        return self._relative(self.rest)

    def error(self, change: Tensor) -> float:
        """The relative error with a change D, [O, K] fp64: sum ||t - (W + D) x||^2 / sum ||t||^2."""
        written = (change.to(self.gram.dtype) @ self.gram).double()
        return self._relative(self.rest - 2.0 * _dot(change, self.missing) + _dot(written, change))

    def solution(self, ridge: float) -> Tensor:
        """Return D = (sum (t - W x) x^T) (sum x x^T + ridge)^-1, [O, K] fp64; `ridge` is relative to `unit`.

        If the second matrix cannot be factored, the ridge is multiplied by ten until it can; above a relative ridge of
        1e4, D is zero.
        """
        while ridge <= _MAX_RIDGE:
            shifted = self.gram.to(torch.float64, copy=True)
            shifted.diagonal().add_(ridge * self.unit)
            factor = cholesky(shifted, overwrite=True)
            if factor is not None:
                return solve(factor, self.missing.T).T
            ridge = max(10.0 * ridge, 1e-10)
        return torch.zeros_like(self.missing)

    def _relative(self, rest: Tensor) -> float:
        return float(rest / self.square) if self.square > 0.0 else 0.0


@dataclass(frozen=True)
class Fit:
    """A solution: a change of a weight, [O, K] fp64, the ridge it was found with, and the errors before and with it."""

    change: Tensor
    ridge: float
    error_before: float
    error: float

    def write(self, weight: Tensor, columns: Tensor) -> None:
        """Add the change to these columns ([K] int64) of a weight [O, I], if that makes the error smaller."""
        if self.error < self.error_before:
            weight[:, columns] = (weight[:, columns].double() + self.change).to(weight.dtype)


def fit(problem: Problem, judge: Problem, ridges: Sequence[float], first: float | None = None) -> Fit:
    """Solve a problem with the ridge whose solution has the smallest error in another problem, over other tokens.

    The error as a function of the ridge is assumed to have a single minimum, so that not all ridges are tried.

    Args:
        problem: the problem to solve.
        judge: the problem whose error chooses the ridge.
        ridges: candidates, ascending.
        first: the candidate to start from; None: the middle one.
    """
    before = judge.error_before

    def attempt(ridge: float) -> Fit:
        found = problem.solution(ridge)
        return Fit(found, ridge, before, judge.error(found))

    first_tried = len(ridges) // 2 if first is None else ridges.index(first)
    return first_minimum(ridges, first_tried, attempt, lambda found: found.error)


_Found = TypeVar("_Found")


def first_minimum(
    candidates: Sequence[float], first: int, attempt: Callable[[float], _Found], error: Callable[[_Found], float]
) -> _Found:
    """Search from candidate `first` towards the front while the error falls; if it does not, towards the back.

    Args:
        candidates: in the order of the search; each is tried at most once.
        first: the index of the candidate to start from.
        attempt: computes a result from a candidate.
        error: computes the error of a result.

    Returns:
        The result with the smallest error found.
    """
    best = attempt(candidates[first])
    for direction in (reversed(candidates[:first]), candidates[first + 1 :]):
        start = best
        for candidate in direction:
            found = attempt(candidate)
            if not error(found) < error(best):
                break
            best = found
        if best is not start:
            break
    return best


def _others(columns: Tensor, width: int) -> Tensor:
    """All columns except these [K], ascending: [width - K] int64; computed without waiting for the device."""
    kept = torch.zeros(width, dtype=torch.uint8, device=columns.device).index_fill_(0, columns, 1)
    return kept.argsort(stable=True)[: width - len(columns)]


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """The scalar sum of products, with the same bits at any number of threads: no sum is split between threads."""
    return (left * right).sum(0).sum()
