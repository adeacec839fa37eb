"""The results of the importance and gradient ops, as dataclasses and named tuples of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

Side = Literal["rows", "columns", "both"]
"""Which sums of a matrix an op computes: over the columns of each row, over the rows of each column, or both."""

Number = TypeVar("Number", Tensor, float)


def sides(side: Side) -> tuple[bool, bool]:
    """Return whether `side` includes row sums, and whether it includes column sums.

    Raises:
        ValueError: `side` is not one of "rows", "columns" and "both".
    """
    if side not in ("rows", "columns", "both"):
        raise ValueError(f"side: {side!r} is none of rows, columns, both")
    return side != "columns", side != "rows"


@dataclass(frozen=True)
class GradientStatistics(Generic[Number]):
    """Statistics of a gradient's elements, or of K gradients, in which case each field is [K].

    sum_abs: sum of |g|. sum_square: sum of g^2. max_abs, min_abs: the largest and the smallest |g|; 0 and infinity
    if there is no finite element. non_finite: number of NaN and infinite elements, which are left out of all other
    fields.
    """

    sum_abs: Number
    sum_square: Number
    max_abs: Number
    min_abs: Number
    non_finite: Number

    @staticmethod
    def unpack(packed: Tensor) -> "GradientStatistics[Tensor]":
        """Return views of the statistics stored along the last dimension of [..., 5], in the order of the fields."""
        return GradientStatistics(*packed.unbind(-1))

    def pack(self: "GradientStatistics[Tensor]") -> Tensor:
        """Stack the fields in their order into [..., 5]; the inverse of `unpack`."""
        return torch.stack(self.numbers(), -1)

    def numbers(self) -> tuple[Number, ...]:
        """Return the fields' values in their order."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @staticmethod
    def stack(statistics: "Sequence[GradientStatistics[Tensor]]") -> "GradientStatistics[Tensor]":
        """Combine the statistics of K gradients (at least one) into one object with fields [K] fp64."""
        return GradientStatistics.unpack(torch.stack([entry.pack().double() for entry in statistics]))

    def merge(self: "GradientStatistics[Tensor]") -> "GradientStatistics[Tensor]":
        """Return the statistics of the elements of all K gradients (at least one) taken together."""
        return GradientStatistics(
            self.sum_abs.sum(), self.sum_square.sum(), self.max_abs.max(), self.min_abs.min(), self.non_finite.sum()
        )

    def scale(self: "GradientStatistics[Tensor]", factors: Sequence[float] | float) -> "GradientStatistics[Tensor]":
        """Return the statistics after gradient k is multiplied by factors[k] > 0, or all K by one factor."""
        s: Tensor | float = factors if isinstance(factors, float) else self.sum_abs.new_tensor(factors)
        return GradientStatistics(
            self.sum_abs * s, self.sum_square * (s * s), self.max_abs * s, self.min_abs * s, self.non_finite
        )

    def to_float(self: "GradientStatistics[Tensor]") -> "GradientStatistics[float]":
        """Convert the statistics of one gradient to Python numbers."""
        return GradientStatistics(*self.pack().tolist())

    def to_list(self: "GradientStatistics[Tensor]") -> "list[GradientStatistics[float]]":
        """Convert the statistics of each of the K gradients to Python numbers."""
        return [GradientStatistics(*values) for values in self.pack().tolist()]


class MaskGradient(NamedTuple):
    """Sums over a linear layer's input x [N, T, I] and the gradient dx of each sample's loss with respect to x.

    gradient: [N, I], sum over tokens of x dx: each sample's gradient of a mask (of value 1) on each input column. It
    equals the column sums of w g_n and needs no weight gradient. input_square: [N, I], sum over tokens of x^2. Both are
    fp32, or fp64 if x and dx are fp64.
    """

    gradient: Tensor
    input_square: Tensor


@dataclass(frozen=True)
class SideSums:
    """The result of an importance op: sums over a weight's rows and columns, and its gradient's statistics."""

    rows: Tensor | None
    columns: Tensor | None
    statistics: GradientStatistics[Tensor]

    def sums(self, side: Literal["rows", "columns"]) -> Tensor:
        """Return one side's sums of |w g| and of w^2 g^2: [..., 2, O] for rows, [..., 2, I] for columns.

        Raises:
            ValueError: the op did not compute this side.
        """
        found = self.rows if side == "rows" else self.columns
        if found is None:
            raise ValueError(f"side: the {side} were not computed")
        return found


@dataclass(frozen=True)
class ImportanceVectors(SideSums):
    """Row and column sums for a weight W `[O, I]` and its gradient G `[O, I]`, and G's statistics.

    rows: [2, O], sums over columns of |w g| and of w^2 g^2. columns: [2, I], sums over rows of the same.
    statistics: statistics of G without W, as 0-dimensional fields.

    The sums of a side that was not requested, and the properties that view them, are None. Everything is fp32, or fp64
    if W and G are fp64. A non-finite element of G makes the sums of its row and its column non-finite. If the vectors
    are sums over samples, the samples' statistics are merged.
    """

    @property
    def row_abs(self) -> Tensor | None:
        """The sums over columns of |w g|: [O]."""
        return None if self.rows is None else self.rows[0]

    @property
    def row_square(self) -> Tensor | None:
        """The sums over columns of w^2 g^2: [O]."""
        return None if self.rows is None else self.rows[1]

    @property
    def column_abs(self) -> Tensor | None:
        """The sums over rows of |w g|: [I]."""
        return None if self.columns is None else self.columns[0]

    @property
    def column_square(self) -> Tensor | None:
        """The sums over rows of w^2 g^2: [I]."""
        return None if self.columns is None else self.columns[1]


@dataclass(frozen=True)
class GroupedVectors(SideSums):
    """`ImportanceVectors` of the weights [O, I] of E experts and their gradients.

    rows: [E, 2, O]. columns: [E, 2, I]. statistics: each field [E]. A side that was not requested is None.
    """


def check_grouped(x: Tensor, dy: Tensor, w: Tensor, offsets: Tensor) -> int:
    """Check the arguments of `grouped_linear_importance` and return the number of samples N.

    Raises:
        ValueError: the shapes do not fit; the message names the argument.
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
