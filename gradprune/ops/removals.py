"""The oracle of `cheapest_removals`, which removes groups of columns one by one, each time the cheapest group.

With A^-1 the inverse of a Gram matrix, M = W^T W, and Q a group's columns, removing the group and letting least squares
compensate for it costs tr( (A^-1_QQ)^-1 M_QQ ) (optimal brain surgeon: Hassibi and Stork 1992; see
`gradprune.calibration.obs`). Let A^-1_QQ = L L^T and s = L^-1 A^-1[Q, :]. Removing the group updates both matrices:

    A^-1 <- A^-1 - s^T s,    M <- M - s^T d - d^T s,    d = L^-1 M[Q, :] - (L^-1 M_QQ L^-T) s / 2.

Only the diagonal blocks of the matrices are kept up to date; a group's other entries are computed when the group is
removed, from s and d of the groups removed before. Removing n of k groups of c columns reads about n^2 k c^2 numbers
twice.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Removals(NamedTuple):
    """Which groups are removed and at what cost.

    taken: [count] int64, the removed groups in order of removal. costs: [count] fp64, the cost of each removal, given
    those before it.
    """

    taken: Tensor
    costs: Tensor


def check_removals(inverse: Tensor, gram: Tensor, columns: int, count: int) -> int:
    """Check the arguments of `cheapest_removals` and return the number of groups k.

    Raises:
        ValueError: the arguments do not fit; the message names the argument.
    """
    for name, matrix in (("inverse", inverse), ("gram", gram)):
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape != inverse.shape:
            raise ValueError(f"{name}: has shape {tuple(matrix.shape)}; inverse and gram must be square, of one shape")
        if matrix.dtype != torch.float64:
            raise ValueError(f"{name}: dtype {matrix.dtype}; torch.float64 is needed")
    if columns < 1 or len(inverse) % columns:
        raise ValueError(f"columns: {columns} does not divide the {len(inverse)} columns into groups")
    groups = len(inverse) // columns
    if not 0 <= count <= groups:
        raise ValueError(f"count: {count} of {groups} groups cannot be removed")
    return groups


def diagonal_blocks(matrix: Tensor, columns: int) -> Tensor:
    """Copy the diagonal blocks [k, c, c] of a matrix [k * c, k * c], where c = `columns`."""
    blocks: Tensor = matrix.unflatten(1, (-1, columns)).unflatten(0, (-1, columns))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def costs_alone(inverse: Tensor, gram: Tensor) -> Tensor:
    """Compute each group j's cost [k] if it alone is removed: tr( (A^-1_jj)^-1 M_jj ).

    inverse, gram: [k, c, c] each, the groups' diagonal blocks of A^-1 and of M = W^T W.
    """
    if gram.shape[1] == 1:
        products = gram / inverse
    else:
        products = torch.cholesky_solve(gram, torch.linalg.cholesky_ex(inverse)[0])
    return products.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0.0)


def cheapest_removals_reference(inverse: Tensor, gram: Tensor, columns: int, count: int) -> Removals:
    """Remove the cheapest group of columns `count` times.

    Args:
        inverse: [k * c, k * c] fp64, A^-1, positive definite.
        gram: [k * c, k * c] fp64, M.
        columns: c, the number of columns of each group; group j consists of columns j * c to (j + 1) * c - 1.
        count: number of groups to remove, 0 to k.

    Deterministic; ties are broken by the lower index.

    Raises:
        ValueError: the arguments do not fit; the message names the argument.
    """
    groups = check_removals(inverse, gram, columns, count)
    inverse_blocks, gram_blocks = (diagonal_blocks(each, columns) for each in (inverse, gram))
    gone = torch.zeros(groups, dtype=torch.bool, device=gram.device)
    # The rows s and d of the groups removed so far.
    s, d = (gram.new_empty(count * columns, len(gram)) for _ in range(2))
    taken, costs = [], []
    for step in range(count):
        each = costs_alone(inverse_blocks, gram_blocks).masked_fill(gone, torch.inf)
        group = each.argmin().view(1)
        taken.append(group)
        costs.append(each[group])
        at = (group * columns + torch.arange(columns, device=group.device)) if columns > 1 else group
        own, change = _rows(inverse, gram, inverse_blocks[group][0], at, s[: step * columns], d[: step * columns])
        s[step * columns : (step + 1) * columns] = own
        d[step * columns : (step + 1) * columns] = change
        own, change = (rows.unflatten(1, (-1, columns)).transpose(0, 1) for rows in (own, change))
        inverse_blocks -= own.mT @ own
        across = own.mT @ change
        gram_blocks -= across + across.mT
        gone[group] = True
    if not count:
        return Removals(gone.new_empty(0, dtype=torch.int64), gram.new_empty(0))
    return Removals(torch.cat(taken), torch.cat(costs))


def _rows(
    inverse: Tensor, gram: Tensor, corner: Tensor, at: Tensor, s_before: Tensor, d_before: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute s and d, [c, k * c] each, of the group with columns `at`.

    corner: A^-1_QQ as updated so far. s_before, d_before: the rows s and d of the groups removed before.
    """
    s_at, d_at = s_before[:, at].T, d_before[:, at].T
    inverse_rows = inverse[at].addmm_(s_at, s_before, alpha=-1.0)
    gram_rows = gram[at].addmm_(s_at, d_before, alpha=-1.0).addmm_(d_at, s_before, alpha=-1.0)
    factor = torch.linalg.cholesky_ex(corner)[0]
    own, rows = torch.linalg.solve_triangular(factor, torch.stack((inverse_rows, gram_rows)), upper=False)
    middle = torch.linalg.solve_triangular(factor, rows[:, at].T, upper=False)
    return own, rows.addmm_(middle.T, own, alpha=-0.5)
