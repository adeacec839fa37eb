"""Sums over tokens, and the matrix that fits them best: the arithmetic of the repair."""

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

_MOST_RIDGE = 1e4


class MomentSums:
    """`Moments` that batches are added to, on the device of what reads, in fp32 (fp64 for fp64 weights)."""

    def __init__(self, weight: Tensor, *, aimed: bool) -> None:
        """Of no token so far; weight: [O, I], of what reads; aimed: whether anything is wanted."""
        dtype = accumulation_dtype(weight)
        self._gram = GramSum(weight)
        self._cross = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        self._square = torch.zeros((), dtype=dtype, device=weight.device)
        self._aimed = aimed

    def add(self, x: Tensor, z: Tensor | None) -> None:
        """Add a batch of what is read, [..., I], and of what is wanted, [..., O]."""
        rows = self._gram.add(x)
        if z is not None:
            z = z.to(rows.device).flatten(0, -2)
            add_product(self._cross, z, rows)
            z = z.to(self._cross.dtype)
            self._square += _dot(z, z)

    def total(self, ranks: Ranks, name: str) -> "Moments":
        """Over the tokens of all ranks, which divide the batches; the last call.

        Args:
            ranks: all of which call this.
            name: of what reads, for the error.

        Raises:
            NonFiniteError: what is read or wanted is NaN or infinite.
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
    """Sums over tokens of what is read, x [I], and of what is wanted, z [O].

    gram: [I, I], x x^T. cross: [O, I], z x^T. square: [], ||z||^2. The last two are zero if nothing is wanted.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor

    def of_output(self, weight: Tensor, columns: Tensor, blend: float) -> "Problem":
        """The problem of the kept columns ([K] int64) of a weight [O, I], for the target W x + blend (z - W x)."""
        lost = _others(columns, weight.shape[1])
        start, cut = weight[:, columns].double(), weight[:, lost].double()
        gram, cross = self.gram[columns[:, None], columns], self.cross.double()
        # W G of the kept columns, by what the kept and the lost ones read.
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
    """Find the change D [O, K] of a weight W with the least sum over tokens of ||t - (W + D) x||^2.

    gram: [K, K], x x^T, in the dtype it was summed in, which is precise enough for the error. missing: [O, K] fp64,
    (t - W x) x^T. square: [] fp64, ||t||^2. rest: [] fp64, ||t - W x||^2.
    """

    gram: Tensor
    missing: Tensor
    square: Tensor
    rest: Tensor

    @cached_property
    def unit(self) -> Tensor:
        """What ridges are relative to."""
        return self.gram.diagonal().double().mean().clamp_min(torch.finfo(torch.float64).tiny)

    @property
    def error_before(self) -> float:
        """sum ||t - W x||^2 / sum ||t||^2."""
        return self._relative(self.rest)

    def error(self, change: Tensor) -> float:
        """sum ||t - (W + D) x||^2 / sum ||t||^2 of D, [O, K] fp64."""
        written = (change.to(self.gram.dtype) @ self.gram).double()
        return self._relative(self.rest - 2.0 * _dot(change, self.missing) + _dot(written, change))

    def solution(self, ridge: float) -> Tensor:
        """D = (t x^T - W x x^T) (x x^T + ridge)^-1, [O, K] fp64; with ten times the ridge where it does not factor."""
        while ridge <= _MOST_RIDGE:
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
    """A change of a weight, [O, K] fp64, the ridge that it was found with, and the errors with it and before it."""

    change: Tensor
    ridge: float
    error_before: float
    error: float

    def write(self, weight: Tensor, columns: Tensor) -> None:
        """Change these columns, [K] int64, of a weight [O, I], where it is better than the weight as it was."""
        if self.error < self.error_before:
            weight[:, columns] = (weight[:, columns].double() + self.change).to(weight.dtype)


def fit(problem: Problem, judge: Problem, ridges: Sequence[float], first: float | None = None) -> Fit:
    """Solve a problem with the ridge that has the least error in another problem, over other tokens.

    The error is taken to have a single minimum: from `first`, or the middle of `ridges`, ascending, it is followed to
    where it falls.
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
    """What was found at the first minimum of the error, towards the front; towards the back if it rises there at once.

    Args:
        candidates: in order; `first` is the index of the one to begin with.
        attempt, error: what is found with a candidate, and its error.
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
    """[width - K], ascending, all columns but these [K]; without waiting for a device."""
    kept = torch.zeros(width, dtype=torch.uint8, device=columns.device).index_fill_(0, columns, 1)
    return kept.argsort(stable=True)[: width - len(columns)]


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """[] the sum of products, to the same bits at any number of threads: no sum is split between threads."""
    return (left * right).sum(0).sum()
