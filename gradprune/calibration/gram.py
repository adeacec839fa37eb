"""Sums of products over tokens: Gram matrices at half the work, and half-precision products with fp32 sums on GPUs."""

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from gradprune.accumulation import accumulation_dtype
from gradprune.errors import NonFiniteError
from gradprune.models.modes import one_thread
from gradprune.ranks import Ranks

# If either side of a product is smaller than this, threads split its sums, so that rounding depends on the number of
# threads. On Intel's CPUs MKL does so for more shapes, unless MKL_CBWR is AUTO,STRICT.
_NARROW = 128
# Least width of a tile. Matrices too narrow for two are computed in one product, because skipping the upper triangle
# would save too little.
_TILE = 192
# Rows that are mirrored at a time, so that no second matrix is needed.
_MIRRORED = 1024


class GramSum:
    """The sum over tokens of x x^T, for the inputs x [I] of a weight [O, I]: fp32 (fp64 for fp64 weights).

    The sum is on the weight's device. tokens: the number of this rank's tokens added so far.
    """

    def __init__(self, weight: Tensor) -> None:
        """Start with no tokens, for the inputs of `weight` [O, I]."""
        width = weight.shape[1]
        self.tokens = 0
        self._sum = torch.zeros(width, width, dtype=accumulation_dtype(weight), device=weight.device)

    def add(self, x: Tensor) -> Tensor:
        """Add a batch's tokens x [..., I]; return them as [tokens, I] on the weight's device."""
        rows = x.to(self._sum.device).flatten(0, -2)
        add_gram(self._sum, rows)
        self.tokens += len(rows)
        return rows

    def total(self, ranks: Ranks, stage: str, name: str) -> Tensor:
        """[I, I]: the sum over the tokens of all ranks. Frees this rank's sum, so it must be the last call.

        Args:
            ranks: the processes that share the tokens; all of them call this.
            stage, name: the names of the stage and of the weight, for the error.

        Raises:
            NonFiniteError: an input is NaN or infinite.
        """
        gram = ranks.sum(self._sum)
        del self._sum
        require_finite(gram.diagonal(), f"{stage}: the input of {name}")
        return mirror(gram)


def require_finite(sums: Tensor, what: str) -> None:
    """Raise NonFiniteError, which names `what`, if any element of `sums` is not finite."""
    if not sums.isfinite().all():
        raise NonFiniteError(f"{what} is not finite; load the model in a wider dtype (bfloat16 or float32)")


def add_gram(gram: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to `gram`, on and below the diagonal only; `mirror` fills in the rest.

    Args:
        gram: [I, I], fp32 or fp64.
        rows: [tokens, I], floating point.
    """
    for start, end in tiles(len(gram)):
        add_product(gram[start:end, :end], rows[:, start:end], rows[:, :end])


def tiles(width: int) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of the tiles into which a matrix of this width is split to compute one triangle only."""
    count = max(1, min(8, width // _TILE))
    return itertools.pairwise(tile * width // count for tile in range(count + 1))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to `total`, summed in its dtype.

    Args:
        total: [A, B], fp32 or fp64.
        left, right: [tokens, A] and [tokens, B], floating point. Half-precision factors are multiplied as they are on
            CUDA, with fp32 sums; elsewhere they are first converted to `total`'s dtype.
    """
    if total.is_cuda and left.dtype == right.dtype in (torch.bfloat16, torch.float16):
        total += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        with same_rounding(total):
            total.addmm_(left.T.to(total.dtype), right.to(total.dtype))


def same_rounding(product: Tensor) -> AbstractContextManager[None]:
    """Context manager for a matrix product into `product`: uses one thread if several threads would split its sums."""
    return one_thread() if min(product.shape) < _NARROW else nullcontext()


def mirror(gram: Tensor) -> Tensor:
    """Copy the lower triangle of `gram`, [I, I], onto its upper triangle in place; return `gram`."""
    for start in range(0, len(gram), _MIRRORED):
        end = min(start + _MIRRORED, len(gram))
        corner = gram[start:end, start:end].tril_()
        corner += corner.tril(-1).T
        gram[start:end, end:] = gram[end:, start:end].T
    return gram
