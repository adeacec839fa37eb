"""Cholesky factors and inverses of large matrices whose bits do not depend on the number of threads.

LAPACK's factorisation and BLAS' triangular solve split the work among threads, so their rounding depends on the number
of threads. Here they are given only small blocks, on one thread. Everything else is matrix products, each of whose
elements is a single sum in a fixed order.
"""

import torch
from torch import Tensor

from gradprune.calibration.gram import add_product, mirror, same_rounding, tiles
from gradprune.models.modes import one_thread

# LAPACK factorises matrices up to this size on one thread.
_BLOCK = 128


def cholesky(matrix: Tensor, *, overwrite: bool = False) -> Tensor | None:
    """[n, n] lower triangular L with L L^T = `matrix` [n, n] fp64; None if `matrix` is not positive definite.

    overwrite: whether to compute L in the memory of `matrix`.
    """
    factor = matrix.tril_() if overwrite else matrix.tril()
    for start in range(0, len(factor), _BLOCK):
        end = min(start + _BLOCK, len(factor))
        done = factor[start:, :start]
        panel = factor[start:, start:end]
        with same_rounding(panel):
            panel.addmm_(done, done[: end - start].T, alpha=-1.0)
        corner, failed = torch.linalg.cholesky_ex(factor[start:end, start:end])
        if failed:
            return None
        factor[start:end, start:end] = corner
        below = factor[end:, start:end]
        with one_thread():
            below.copy_(torch.linalg.solve_triangular(corner, below.T, upper=False).T)
    return factor.tril_()


def inverse(factor: Tensor) -> Tensor:
    """[n, n] (L L^T)^-1 for a factor L, computed in L's memory; needs memory for another 1.25 such matrices meanwhile.

    L^-1 is lower triangular too; most of its zeros are left out of the products.
    """
    half = torch.zeros_like(factor)
    for start, end in tiles(len(factor)):
        ones = torch.eye(len(factor) - start, end - start, dtype=factor.dtype, device=factor.device)
        half[start:, start:end] = _substituted(factor[start:, start:], ones, upper=False)
    factor.zero_()
    for start, end in tiles(len(factor)):
        add_product(factor[start:end, :end], half[start:, start:end], half[start:, :end])
    return mirror(factor)


def solve(factor: Tensor, right: Tensor) -> Tensor:
    """[n, m] (L L^T)^-1 `right` for a factor L [n, n] and `right` [n, m]."""
    if right.is_cpu:
        right = right.clone(memory_format=torch.contiguous_format)
    half = _substituted(factor, right, upper=False)
    return _substituted(factor.T, half, upper=True)


def _substituted(factor: Tensor, right: Tensor, *, upper: bool) -> Tensor:
    """[n, m] `factor`^-1 `right` for a triangular factor [n, n]; on a CPU it overwrites `right`."""
    if not factor.is_cpu:
        solved: Tensor = torch.linalg.solve_triangular(factor, right, upper=upper)
        return solved
    starts = range(0, len(factor), _BLOCK)
    for start in reversed(starts) if upper else starts:
        end = min(start + _BLOCK, len(factor))
        known = slice(end, None) if upper else slice(0, start)
        rows = right[start:end]
        with same_rounding(rows):
            rows.addmm_(factor[start:end, known], right[known], alpha=-1.0)
        with one_thread():
            rows.copy_(torch.linalg.solve_triangular(factor[start:end, start:end], rows, upper=upper))
    return right
