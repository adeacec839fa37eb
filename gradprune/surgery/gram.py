"""Sums of products over tokens: half the work for a Gram matrix, and half-precision products in fp32 sums on GPUs."""

import itertools

import torch
from torch import Tensor

# Widths below this are one product: the triangle saves too little.
_TILE = 192


def add_gram(gram: Tensor, rows: Tensor) -> None:
    """gram += rows^T rows, on and below the diagonal only; `symmetric` fills in the rest.

    Args:
        gram: [I, I], fp32 or fp64.
        rows: [tokens, I] floating point.
    """
    width = len(gram)
    tiles = max(1, min(8, width // _TILE))
    edges = [tile * width // tiles for tile in range(tiles + 1)]
    for start, end in itertools.pairwise(edges):
        add_product(gram[start:end, :end], rows[:, start:end], rows[:, :end])


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, summed in `total`'s type.

    Args:
        total: [A, B], fp32 or fp64.
        left, right: [tokens, A] and [tokens, B] floating point. Half-precision ones are multiplied as they are on
            CUDA, with fp32 sums, and converted first elsewhere.
    """
    if total.is_cuda and left.dtype == right.dtype in (torch.bfloat16, torch.float16) and _MIXED:
        total += torch.mm(left.T, right, out_dtype=total.dtype)
    else:
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype))


def symmetric(gram: Tensor) -> Tensor:
    """[I, I]: the matrix whose lower triangle is that of `gram`."""
    return gram.tril() + gram.tril(-1).T


# torch.mm's out_dtype came with torch 2.8.
_MIXED = hasattr(torch.ops.aten.mm, "dtype")
