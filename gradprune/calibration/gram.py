"""Sums of products over tokens: half the work for a Gram matrix, and half-precision products in fp32 sums on GPUs."""

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from gradprune.accumulation import accumulation_dtype
from gradprune.errors import NonFiniteError
from gradprune.models.modes import one_thread
from gradprune.ranks import Ranks

# Below this size of either side, threads split the sums of a product, so rounding depends on the number of threads. On
# Intel's CPUs MKL does so for more shapes, unless MKL_CBWR is AUTO,STRICT.
_NARROW = 128
# Narrower matrices are computed in one product: skipping the upper triangle saves too little.
_TILE = 192
# How many rows are mirrored at a time, so that no second matrix is needed.
_MIRRORED = 1024


class GramSum:
    """The sum over tokens of x x^T, for the inputs x [I] of a weight [O, I], on the weight's device.

    tokens: how many of this rank's tokens have been added.
    """

    def __init__(self, weight: Tensor) -> None:
        """Of no token so far."""
        width = weight.shape[1]
        self.tokens = 0
        self._sum = torch.zeros(width, width, dtype=accumulation_dtype(weight), device=weight.device)

    def add(self, x: Tensor) -> Tensor:
        """Add the tokens of a batch, [..., I]; returns them as [tokens, I] on the device."""
        rows = x.to(self._sum.device).flatten(0, -2)
        add_gram(self._sum, rows)
        self.tokens += len(rows)
        return rows

    def total(self, ranks: Ranks, stage: str, name: str) -> Tensor:
        """[I, I] over the tokens of all ranks; the last call. The names of stage and weight are for the error.

        Raises:
            NonFiniteError: an input is NaN or infinite.
        """
        gram = ranks.sum(self._sum)
        del self._sum
        require_finite(gram.diagonal(), f"{stage}: the input of {name}")
        return mirror(gram)


def require_finite(sums: Tensor, what: str) -> None:
    """Raise NonFiniteError, which says what is not finite, if any of `sums` is not."""
    if not sums.isfinite().all():
        raise NonFiniteError(f"{what} is not finite; load the model in a wider dtype (bfloat16 or float32)")


def add_gram(gram: Tensor, rows: Tensor) -> None:
    """gram += rows^T rows, on and below the diagonal only; `mirror` fills in the rest.

    Args:
        gram: [I, I], fp32 or fp64.
        rows: [tokens, I] floating point.
    """
    for start, end in tiles(len(gram)):
        add_product(gram[start:end, :end], rows[:, start:end], rows[:, :end])


def tiles(width: int) -> Iterator[tuple[int, int]]:
    """Where the parts begin and end by which a triangle of such a width is computed without the other."""
    count = max(1, min(8, width // _TILE))
    return itertools.pairwise(tile * width // count for tile in range(count + 1))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, summed in `total`'s type.

    Args:
        total: [A, B], fp32 or fp64.
        left, right: [tokens, A] and [tokens, B] floating point. Half-precision ones are multiplied as they are on
            CUDA, with fp32 sums, and converted first elsewhere.
    """
    if total.is_cuda and left.dtype == right.dtype in (torch.bfloat16, torch.float16):
        total += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        with same_rounding(total):
            total.addmm_(left.T.to(total.dtype), right.to(total.dtype))


def same_rounding(product: Tensor) -> AbstractContextManager[None]:
    """For a matrix product into `product`: one thread if several would split its sums."""
    return one_thread() if min(product.shape) < _NARROW else nullcontext()


def mirror(gram: Tensor) -> Tensor:
    """Make the upper triangle of `gram`, [I, I], that of its lower one, in place; returns it."""
    for start in range(0, len(gram), _MIRRORED):
        end = min(start + _MIRRORED, len(gram))
        corner = gram[start:end, start:end].tril_()
        corner += corner.tril(-1).T
        gram[start:end, end:] = gram[end:, start:end].T
    return gram
