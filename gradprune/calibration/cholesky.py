"""Cholesky factors and inverses of large matrices, to the same bits whatever the number of threads.

LAPACK's own factorisation splits the work among threads, so its rounding depends on their number. Here it factors only
small blocks; everything else is matrix products and triangular solves, whose results are each one sum in a fixed order.
"""

import torch
from torch import Tensor

from gradprune.calibration.gram import add_gram, mirror, same_rounding

# LAPACK factors matrices up to this size on one thread.
_BLOCK = 128


def cholesky(matrix: Tensor, *, overwrite: bool = False) -> Tensor | None:
    """[n, n] lower triangular L with L L^T = matrix; None where `matrix`, [n, n] fp64, is not positive definite.

    overwrite: L takes the place of `matrix`.
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
        below.copy_(torch.linalg.solve_triangular(corner, below.T, upper=False).T)
    return factor.tril_()


def inverse(factor: Tensor) -> Tensor:
    """[n, n] (L L^T)^-1 of a factor L, whose place it takes; one more matrix is in memory meanwhile."""
    # Columns lie together, so that they are solved for in place.
    half = torch.eye(len(factor), dtype=factor.dtype, device=factor.device).T
    torch.linalg.solve_triangular(factor, half, upper=False, out=half)
    add_gram(factor.zero_(), half)
    return mirror(factor)


def solve(factor: Tensor, right: Tensor) -> Tensor:
    """[n, m] (L L^T)^-1 right of a factor L and right [n, m]."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(factor.T, half, upper=True)
    return solution
