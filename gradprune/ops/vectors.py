"""`ImportanceVectors`: everything one weight's gradient leaves behind, O(rows + columns) numbers."""

from dataclasses import dataclass

from torch import Tensor

STATISTICS = ("sum_abs", "sum_square", "max_abs", "min_abs", "non_finite")


@dataclass(frozen=True)
class ImportanceVectors:
    """Row and column sums of a weight W `[O, I]` and its gradient G `[O, I]`, and G's statistics.

    row_abs: [O], sum over columns of |w g|.            column_abs: [I], sum over rows of |w g|.
    row_signed: [O], sum over columns of w g.           column_signed: [I], sum over rows of w g.
    row_square: [O], sum over columns of w^2 g^2.       column_square: [I], sum over rows of w^2 g^2.
    statistics: [5], of G alone: sum|g|, sum g^2, max|g|, min|g|, number of non-finite elements
        (which enter none of the other four). An empty G has max|g| = 0 and min|g| = inf.

    All fp32, or fp64 where W and G are fp64. A non-finite gradient element makes its row's and column's sums
    non-finite. Summed over samples, `statistics` adds sums and counts and takes the extremes' extremes.
    """

    row_abs: Tensor
    row_signed: Tensor
    row_square: Tensor
    column_abs: Tensor
    column_signed: Tensor
    column_square: Tensor
    statistics: Tensor
