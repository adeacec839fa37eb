"""What one block accumulates over calibration: a handful of vectors over its groups, in fp64."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from gradprune.calibration.capture import Observer
from gradprune.config import Reduction
from gradprune.models import Block
from gradprune.models.blocks import InputLinear, OutputLinear
from gradprune.ops.dispatch import ImportanceOps
from gradprune.ops.vectors import GradientStatistics, ImportanceVectors


class BlockAccumulator:
    """Sums over samples (or batches) of one block's group importances and gradient statistics.

    What the backward pass of a step brings is pending until `commit`, because a repair of the gradients of a batch
    is known only when all layers' gradients are.

    first: [groups], sum of |w g| over the group's elements (`reduction="sample"` only).
    second: [groups], sum of w^2 g^2 over the group's elements.
    mask_square: [groups], sum of (sum of w g over the group's output columns)^2, the squared gradient of a
        mask on the group.
    statistics: per linear layer, those of each step's gradients.
    scales: one a step, what the step's gradients were multiplied by.
    gates: one entry a step, the gradient of a gate on the block's output: [N] by sample, or [1] by batch.
    input_square, tokens: [I] sum of x^2 at the output projection, and over how many tokens.
    """

    def __init__(self, block: Block, reduction: Reduction, ops: ImportanceOps, *, repaired: bool = False) -> None:
        """Start at zero; `ops` computes the vectors of one weight's gradient.

        repaired: `commit` will be given other scales than 1; with `reduction="batch"` the gradients of a batch are
            then kept until it is called.
        """
        self.block = block
        self._reduction = reduction
        self._repaired = repaired
        self._ops = ops
        device = block.output.linear.weight.device
        self.first = torch.zeros(block.groups, dtype=torch.float64, device=device)
        self.second = torch.zeros_like(self.first)
        self.mask_square = torch.zeros_like(self.first)
        self.statistics: dict[str, list[GradientStatistics[Tensor]]] = {entry.path: [] for entry in block.projections}
        self.scales: list[float] = []
        self.gates: list[Tensor] = []
        self.input_square = torch.zeros(block.output.linear.in_features, dtype=torch.float64, device=device)
        self.tokens = 0
        self._pending = torch.zeros(3, block.groups, dtype=torch.float64, device=device)
        self._pending_gradients: dict[str, Tensor] = {}
        self._gradient_sums: dict[str, Tensor] = {}

    def commit(self, scale: float = 1.0) -> None:
        """Add the step's sums, as if its gradients had been multiplied by `scale`."""
        first, second, mask_square = self._pending
        self.first += scale * first
        self.second += scale**2 * second
        self.mask_square += scale**2 * mask_square
        for path, gradient in self._pending_gradients.items():
            self._add_gradient(path, gradient.mul_(scale))
        self.scales.append(scale)
        self._pending.zero_()
        self._pending_gradients.clear()

    def observers(self) -> Iterator[tuple[nn.Linear, Observer]]:
        """Each linear layer of the block with what to call in its backward pass."""
        for entry in self.block.projections:
            yield entry.linear, self._observer(entry)

    def observe_input(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the output projection: the second moment of its input, for Wanda.

        A layer recomputed under checkpointing counts twice in sum and tokens alike; the mean is the same.
        """
        x = args[0].detach().flatten(0, -2)
        self.input_square += x.to(_accumulation_dtype(x)).square().sum(0)
        self.tokens += x.shape[0]

    def part(self, name: str, count: int) -> Tensor:
        """[groups] fp64, one of `gradprune.calibration.methods.PARTS` after `count` samples (batches)."""
        if name == "magnitude":
            return self._folded_weights(None)
        if name == "wanda":
            return self._folded_weights((self.input_square / self.tokens).sqrt())
        if name == "group_fisher":
            return self.mask_square / count
        if name == "fisher":
            return 0.5 * self.second / count
        return self.first / count if self._reduction == "sample" else self._first_of_mean_gradient(count)

    def _observer(self, entry: InputLinear | OutputLinear) -> Observer:
        if self._reduction == "sample":
            return lambda x, dy, dx: self._observe_samples(entry, x, dy, dx)
        return lambda x, dy, dx: self._observe_batch(entry, x, dy, dx)

    def _observe_samples(self, entry: InputLinear | OutputLinear, x: Tensor, dy: Tensor, dx: Tensor) -> None:
        self._accumulate(entry, self._ops.linear_importance(x, dy, entry.linear.weight, _side(entry)))
        if isinstance(entry, OutputLinear):
            self._observe_mask(entry, _column_signed(x, dx), dy.sum(1))

    def _observe_batch(self, entry: InputLinear | OutputLinear, x: Tensor, dy: Tensor, dx: Tensor) -> None:
        samples = x.shape[0]
        dtype = _accumulation_dtype(entry.linear.weight)
        gradient = dy.flatten(0, 1).to(dtype).T @ x.flatten(0, 1).to(dtype) / samples
        self._accumulate(entry, self._ops.taylor_score(entry.linear.weight, gradient, _side(entry)))
        if self._repaired:
            self._pending_gradients[entry.path] = gradient
        else:
            self._add_gradient(entry.path, gradient)
        if isinstance(entry, OutputLinear):
            signed = _column_signed(x, dx).sum(0, keepdim=True) / samples
            self._observe_mask(entry, signed, dy.sum((0, 1))[None] / samples)

    def _accumulate(self, entry: InputLinear | OutputLinear, vectors: ImportanceVectors) -> None:
        sums = vectors.sums(_side(entry))
        self._pending[0] += self._fold(entry, sums.abs)
        self._pending[1] += self._fold(entry, sums.square)
        self.statistics[entry.path].append(vectors.statistics)

    def _add_gradient(self, path: str, gradient: Tensor) -> None:
        if path in self._gradient_sums:
            self._gradient_sums[path] += gradient
        else:
            self._gradient_sums[path] = gradient

    def _observe_mask(self, entry: OutputLinear, column_signed: Tensor, dy: Tensor) -> None:
        """column_signed: [N, I], column sums of w g_n; dy: [N, O], the output gradient summed over tokens."""
        by_group = entry.fold_columns(column_signed).double()
        self._pending[2] += by_group.square().sum(0)
        gate = by_group.sum(1)
        if entry.linear.bias is not None:
            gate = gate + dy.double() @ entry.linear.bias.detach().double()
        self.gates.append(gate)

    def _fold(self, entry: InputLinear | OutputLinear, sums: Tensor) -> Tensor:
        """Sums over `_side(entry)` into sums over groups."""
        if isinstance(entry, OutputLinear):
            return entry.fold_columns(sums)
        return entry.fold_rows(sums, self.block.groups)

    def _first_of_mean_gradient(self, batches: int) -> Tensor:
        total = torch.zeros_like(self.second)
        for entry in self.block.projections:
            mean = self._gradient_sums[entry.path] / batches
            vectors = self._ops.taylor_score(entry.linear.weight.detach(), mean, _side(entry))
            total += self._fold(entry, vectors.sums(_side(entry)).abs)
        return total

    def _folded_weights(self, column_scale: Tensor | None) -> Tensor:
        """Sum of |w| over each group: all its elements, or, with a scale per column, its output columns only."""
        output = self.block.output
        columns = output.linear.weight.detach().double().abs().sum(0)
        if column_scale is not None:
            return output.fold_columns(columns * column_scale)
        total = output.fold_columns(columns)
        for entry in self.block.inputs:
            rows = entry.linear.weight.detach().double().abs().sum(1)
            total = total + entry.fold_rows(rows, self.block.groups)
        return total


def _side(entry: InputLinear | OutputLinear) -> Literal["rows", "columns"]:
    """Groups own rows of input projections and columns of the output projection."""
    return "columns" if isinstance(entry, OutputLinear) else "rows"


def _column_signed(x: Tensor, dx: Tensor) -> Tensor:
    """[N, I], column sums of w g_n for x, dx: [N, T, I]: the sum over tokens of x * dl/dx needs no weight gradient."""
    dtype = _accumulation_dtype(x)
    return (x.to(dtype) * dx.to(dtype)).sum(1)


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
