"""The results of the importance and gradient ops: `GradientStatistics`, `ImportanceVectors` and those of experts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

Side = Literal["rows", "columns", "both"]
"""Which sums of a matrix an op is asked for: over the columns of each row, over the rows of each column, or both."""

Number = TypeVar("Number", Tensor, float)


def sides(side: Side) -> tuple[bool, bool]:
    """Whether `side` asks for row sums, and whether it asks for column sums.

    Raises:
        ValueError: it is not a side.
    """
    if side not in ("rows", "columns", "both"):
        raise ValueError(f"side: {side!r} is none of rows, columns, both")
    return side != "columns", side != "rows"


@dataclass(frozen=True)
class GradientStatistics(Generic[Number]):
    """Statistics of a gradient's elements; of K gradients, when each field is [K].

    sum_abs: sum of |g|. sum_square: sum of g^2. max_abs, min_abs: the largest and the smallest |g|; 0 and infinity
    where there is no finite element. non_finite: number of NaN and infinite elements, which enter none of the others.
    """

    sum_abs: Number
    sum_square: Number
    max_abs: Number
    min_abs: Number
    non_finite: Number

    @staticmethod
    def unpack(packed: Tensor) -> "GradientStatistics[Tensor]":
        """The statistics stored along the last dimension of [..., 5], in the order of the fields; views."""
        return GradientStatistics(*packed.unbind(-1))

    def pack(self: "GradientStatistics[Tensor]") -> Tensor:
        """[..., 5], the fields in their order; inverse of `unpack`."""
        return torch.stack(self.numbers(), -1)

    def numbers(self) -> tuple[Number, ...]:
        """The fields' values in their order."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @staticmethod
    def stack(statistics: "Sequence[GradientStatistics[Tensor]]") -> "GradientStatistics[Tensor]":
        """The statistics of K gradients (at least one) as one, each field [K] fp64."""
        return GradientStatistics.unpack(torch.stack([entry.pack().double() for entry in statistics]))

    def merge(self: "GradientStatistics[Tensor]") -> "GradientStatistics[Tensor]":
        """The statistics of the elements of all K gradients (at least one) together."""
        return GradientStatistics(
            self.sum_abs.sum(), self.sum_square.sum(), self.max_abs.max(), self.min_abs.min(), self.non_finite.sum()
        )

    def scale(self: "GradientStatistics[Tensor]", factors: Sequence[float] | float) -> "GradientStatistics[Tensor]":
        """The statistics of the K gradients after gradient k is multiplied by factors[k] > 0, or all by one factor."""
        s: Tensor | float = factors if isinstance(factors, float) else self.sum_abs.new_tensor(factors)
        return GradientStatistics(
            self.sum_abs * s, self.sum_square * (s * s), self.max_abs * s, self.min_abs * s, self.non_finite
        )

    def to_float(self: "GradientStatistics[Tensor]") -> "GradientStatistics[float]":
        """The statistics of one gradient as Python numbers."""
        return GradientStatistics(*self.pack().tolist())

    def to_list(self: "GradientStatistics[Tensor]") -> "list[GradientStatistics[float]]":
        """The statistics of each of the K gradients as Python numbers."""
        return [GradientStatistics(*values) for values in self.pack().tolist()]


class MaskGradient(NamedTuple):
    """Of a linear layer's input x [N, T, I] and each sample's loss gradient dx at it; fp32, or fp64 where both are.

    gradient: [N, I], sum over tokens of x dx: each sample's gradient of a mask (of value 1) on each input column. It
    equals the column sums of w g_n and needs no weight gradient. input_square: [N, I], sum over tokens of x^2.
    """

    gradient: Tensor
    input_square: Tensor


@dataclass(frozen=True)
class SideSums:
    """What the importance ops return: sums over a weight's rows and columns, and its gradient's statistics."""

    rows: Tensor | None
    columns: Tensor | None
    statistics: GradientStatistics[Tensor]

    def sums(self, side: Literal["rows", "columns"]) -> Tensor:
        """[..., 2, O] or [..., 2, I], the sums over one side: of |w g| and of w^2 g^2.

        Raises:
            ValueError: the op was not asked for them.
        """
        found = self.rows if side == "rows" else self.columns
        if found is None:
            raise ValueError(f"side: the {side} were not computed")
        return found


@dataclass(frozen=True)
class ImportanceVectors(SideSums):
    """Row and column sums for a weight W `[O, I]` and its gradient G `[O, I]`, and G's statistics.

    rows: [2, O], sums over columns of |w g| and of w^2 g^2. columns: [2, I], sums over rows of the same.
    statistics: of G alone, 0-dimensional fields.

    The sums of the side not asked for, and their views by name below, are None. All fp32, or fp64 where W and G are
    fp64. A non-finite element of G makes its row's and its column's sums non-finite. Summed over samples, `statistics`
    are merged.
    """

    @property
    def row_abs(self) -> Tensor | None:
        """[O], sum over columns of |w g|."""
        return None if self.rows is None else self.rows[0]

    @property
    def row_square(self) -> Tensor | None:
        """[O], sum over columns of w^2 g^2."""
        return None if self.rows is None else self.rows[1]

    @property
    def column_abs(self) -> Tensor | None:
        """[I], sum over rows of |w g|."""
        return None if self.columns is None else self.columns[0]

    @property
    def column_square(self) -> Tensor | None:
        """[I], sum over rows of w^2 g^2."""
        return None if self.columns is None else self.columns[1]


@dataclass(frozen=True)
class GroupedVectors(SideSums):
    """`ImportanceVectors` of E experts' weights [O, I] and their gradients.

    rows: [E, 2, O]. columns: [E, 2, I]. statistics: each field [E]. The side not asked for is None.
    """


def check_grouped(x: Tensor, dy: Tensor, w: Tensor, offsets: Tensor) -> int:
    """The number of samples of arguments of `grouped_linear_importance`.

    Raises:
        ValueError: their shapes do not fit; names the argument.
    """
    if w.ndim != 3:
        raise ValueError(f"w: has shape {tuple(w.shape)}; [E, O, I] is needed, a weight for each expert")
    experts, outputs, inputs = w.shape
    if x.ndim != 2 or x.shape[1] != inputs:
        raise ValueError(f"x: has shape {tuple(x.shape)}; [R, {inputs}] is needed, for w {tuple(w.shape)}")
    if dy.shape != (len(x), outputs):
        raise ValueError(f"dy: has shape {tuple(dy.shape)}; {(len(x), outputs)} is needed")
    if offsets.dtype != torch.int64 or offsets.ndim != 1 or not len(offsets) or (len(offsets) - 1) % max(1, experts):
        raise ValueError(
            f"offsets: is {offsets.dtype} {tuple(offsets.shape)}; int64 [{experts} * samples + 1] is needed"
        )
    return (len(offsets) - 1) // max(1, experts)
