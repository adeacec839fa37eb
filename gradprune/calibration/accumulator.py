"""Accumulators: each sums up one block's calibration statistics as a few fp64 vectors over its groups."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradprune.accumulation import accumulation_dtype
from gradprune.calibration.capture import Observer
from gradprune.calibration.gram import add_product
from gradprune.calibration.methods import Depth
from gradprune.models import Block, LinearBlock
from gradprune.models.blocks import InputLinear, OutputLinear
from gradprune.models.footprint import FOLDED
from gradprune.models.modes import hooks_removed
from gradprune.ops.dispatch import ImportanceOps
from gradprune.ops.vectors import GradientStatistics, ImportanceVectors


class BlockSums:
    """Sums over samples (or batches) of one block's group importances, fp64, as views of a ledger's tensors.

    by_name: all sums by name. weights: [2, groups], `first` and `second` as one tensor.
    first: [groups], sum of |w g| over the group's elements. With `reduction="batch"` it is not the "taylor" importance,
        which needs the mean gradient over all batches.
    second: [groups], sum of w^2 g^2 over the group's elements.
    mask_square: [groups], sum of (sum of w g over the group's output columns)^2, the squared gradient of a
        mask on the group.
    input_square: [I], sum of x^2 at the output projection.
    output_square: [outputs], sum of dy^2 at each output projection, with dy the gradient of each sample's own loss;
        zero unless curvatures are collected.
    """

    def __init__(self, block: Block, norms: Tensor, rest: Tensor, more: Sequence[str] = ()) -> None:
        """Make the sums views of `norms` and `rest`, whose lengths are an accumulator's `sizes`.

        more: names of further sums, [groups] each.
        """
        groups, squares = block.groups, block.groups + block.outputs
        if not len(norms):
            norms, rest = rest.split([squares, len(rest) - squares])
        self.mask_square: Tensor
        self.output_square: Tensor
        self.input_square: Tensor
        self.mask_square, self.output_square = norms.split([groups, block.outputs])
        names = ("first", "second", *more)
        of_groups, self.input_square = rest.split([len(names) * groups, block.width])
        self.weights: Tensor = of_groups[: 2 * groups].view(2, groups)
        parts: tuple[Tensor, ...] = of_groups.view(-1, groups).unbind()
        self.by_name: dict[str, Tensor] = dict(zip(names, parts, strict=True))
        self.first, self.second = self.by_name["first"], self.by_name["second"]
        self.by_name |= {name: getattr(self, name) for name in ("mask_square", "input_square", "output_square")}

    def multiply(self, factor: float) -> None:
        """Change the sums to what they would be if the gradients had been multiplied by `factor`."""
        self.first *= factor
        for square in (self.second, self.mask_square, self.output_square):
            square *= factor**2


@dataclass
class StepRecord:
    """What is recorded for one block and one step, in addition to the block's sums.

    statistics: statistics of each linear layer's weight gradient, by path; empty if no weight gradient was computed.
    gate: the gradient with respect to a gate on what the block adds to the residual stream: [N] with
        `reduction="sample"`, [1] with "batch"; None if the step had no backward pass.
    scale: the factor by which the step's gradients were multiplied before they were added to the sums.
    """

    statistics: dict[str, GradientStatistics[Tensor]] = field(default_factory=dict)
    gate: Tensor | None = None
    scale: float = 1.0


class BlockAccumulator(ABC):
    """One block's sums, which are stored in a ledger, and a record of each step.

    A step's contributions stay pending until `commit`, because a failed step is discarded as a whole, and because the
    scale of a batch's gradients is known only after the backward pass has reached all layers.

    sums: over the committed steps. tokens: the number of tokens in `sums.input_square`.
    records: one per committed step. pending: the record of the current step.
    more_sums: the names of further sums over the steps, [groups] each.
    """

    more_sums: tuple[str, ...] = ()
    # Whether sums of squares are first stored as norms, which the ledger then squares for all blocks in one operation.
    _gives_norms = False

    def __init__(self, block: Block, ops: ImportanceOps, curvature: bool = False) -> None:
        """Start without a ledger; call `open` before the first step.

        Args:
            block: the block to observe.
            ops: the implementation of the importance ops.
            curvature: whether to collect `output_square`, from which `gradprune.calibration.obs` gets its curvatures.
        """
        self.block = block
        self.records: list[StepRecord] = []
        self._ops = ops
        self._curvature = curvature
        self.tokens = 0
        self._shape = torch.Size(())
        self.discard()

    @property
    def sizes(self) -> tuple[int, int]:
        """How many fp64 numbers of a ledger the block's sums need: as norms to be squared, and as others."""
        squares = self.block.groups + self.block.outputs
        others = (2 + len(self.more_sums)) * self.block.groups + self.block.width
        return (squares, others) if self._gives_norms else (0, squares + others)

    def open(self, sums: BlockSums, pending: BlockSums) -> None:
        """Use these parts of a ledger, which are zero, for the committed sums and the pending ones."""
        self.sums, self._added = sums, pending

    def discard(self) -> None:
        """Drop the current step's contributions that are not stored in the ledger."""
        self.pending = StepRecord()
        self._pending_tokens = 0

    @torch.no_grad()
    def finish(self, factor: float) -> None:
        """After a step's backward pass, divide its gradients' contributions by `factor`, a power of two."""
        if factor == 1.0:
            return
        self._added.multiply(1.0 / factor)
        if self.pending.gate is not None:
            self.pending.gate /= factor
        for path, found in self.pending.statistics.items():
            self.pending.statistics[path] = found.scale(1.0 / factor)

    def commit(self, scale: float) -> None:
        """Multiply the pending gradients by `scale` and record the step; the ledger then adds the pending sums."""
        if scale != 1.0:
            self._added.multiply(scale)
        self.tokens += self._pending_tokens
        self.pending.scale = scale
        self.records.append(self.pending)

    def state(self) -> dict[str, Tensor]:
        """All committed sums and records, by name, for `restore`."""
        state = {name: value.clone() for name, value in self.sums.by_name.items()}
        state["tokens"] = torch.tensor(self.tokens)
        state["scales"] = torch.tensor([record.scale for record in self.records], dtype=torch.float64)
        gates = [record.gate for record in self.records if record.gate is not None]
        if gates:
            state["gates"] = torch.cat(gates)
        for path in self.records[0].statistics if self.records else ():
            of_steps = [record.statistics[path].pack() for record in self.records if path in record.statistics]
            state[f"statistics.{path}"] = torch.stack(of_steps)
        return state

    def restore(self, state: dict[str, Tensor], gradients: list[int]) -> None:
        """Resume from another accumulator's `state`; `gradients`: the number of gradients in each step."""
        device = self.sums.weights.device
        for name, value in self.sums.by_name.items():
            value.copy_(state[name])
        self.tokens = int(state["tokens"])
        prefix = "statistics."
        statistics = {
            name.removeprefix(prefix): value.to(device) for name, value in state.items() if name.startswith(prefix)
        }
        gates = _of_first_steps(state["gates"].to(device), gradients) if "gates" in state else []
        self.records = [
            StepRecord(
                {path: GradientStatistics.unpack(of[step]) for path, of in statistics.items() if step < len(of)},
                gates[step] if step < len(gates) else None,
                scale,
            )
            for step, scale in enumerate(state["scales"].tolist())
        ]

    def observers(self, _depth: Depth) -> Iterator[tuple[nn.Linear, Observer]]:
        """Yield each linear layer to be observed in the backward pass at this depth, with its observer."""
        return iter(())

    @abstractmethod
    def attached(self, depth: Depth) -> AbstractContextManager[Any]:
        """Context manager that observes what steps of `depth` need beside the linear layers of `observers`."""

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the batch's shape [N, T] before the model puts the tokens of all samples into one row."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self._shape = hidden.shape[:-1]

    def component(self, name: str, count: int) -> Tensor:
        """[groups] fp64: a component of importance (see `gradprune.calibration.methods`) over `count` gradients."""
        if name == "magnitude":
            return self._folded_weights(None)
        if name == "wanda":
            return self._folded_weights((self.sums.input_square / self.tokens).sqrt())
        if name == "group_fisher":
            return self.sums.mask_square / count
        if name == "fisher":
            return 0.5 * self.sums.second / count
        return self._first_order(count)

    @abstractmethod
    def curvatures(self, samples: int) -> Tensor:
        """[outputs]: the curvature of each output projection, see `gradprune.calibration.obs`.

        It is the mean over samples of the diagonal mean of sum over tokens dy dy^T.

        samples: the number of samples in the sums.
        """

    @abstractmethod
    def _first_order(self, count: int) -> Tensor:
        """[groups] fp64: the component "taylor" over `count` gradients."""

    @abstractmethod
    def _folded_weights(self, column_scale: Tensor | None) -> Tensor:
        """[groups] fp64: the sum of |w| over each group's elements.

        column_scale: [I]; if given, only output columns are summed, each multiplied by its scale.
        """


def absolute_sums(weight: Tensor, dim: int) -> Tensor:
    """[I] or [O] fp64: the sums of |w| of a weight [O, I] along dimension 0 or 1; a chunk of rows at a time."""
    parts = weight.detach().split(max(1, FOLDED // weight.shape[1]))
    sums = [part.double().abs().sum(dim) for part in parts]
    return torch.cat(sums) if dim else torch.stack(sums).sum(0)


class LinearAccumulator(BlockAccumulator):
    """Accumulator of a block of plain linear layers, each of which is observed once per step."""

    block: LinearBlock
    _gives_norms = True

    def discard(self) -> None:
        """Drop the current step's contributions that are not stored in the ledger."""
        super().discard()
        # Sums of each weight's rows or columns, arranged by group: [2, groups, rows or columns of a group].
        self._pending_vectors: list[Tensor] = []

    @torch.no_grad()
    def finish(self, factor: float) -> None:
        """Sum the weights' vectors by group after a step's backward pass, and divide its gradients by `factor`."""
        if self._pending_vectors:
            # One sum over all weights, because on a GPU each sum is a launch.
            torch.sum(torch.cat(self._pending_vectors, 2), 2, dtype=torch.float64, out=self._added.weights)
            self._pending_vectors = []
        super().finish(factor)

    def observers(self, depth: Depth) -> Iterator[tuple[nn.Linear, Observer]]:
        """Yield each linear layer to be observed in the backward pass at `depth`, with its observer."""
        if depth is Depth.WEIGHTS:
            for entry in self.block.projections:
                yield entry.linear, self._by_sample(partial(self._observe, entry))
        else:
            yield self.block.output.linear, self._by_sample(self._observe_output)

    def _by_sample(self, observer: Observer) -> Observer:
        """Wrap an observer of [N, T, ...] tensors for a layer that may get the tokens of all samples in one row."""
        if self.block.parent is None:
            return observer
        return lambda x, dy, dx: observer(*(each.view(*self._shape, -1) for each in (x, dy, dx)))

    @contextmanager
    def attached(self, depth: Depth) -> Iterator[None]:
        """Context manager that observes what steps of `depth` need beside the linear layers of `observers`.

        Without a backward pass this is the output projection's input; with one, the batch's shape and the norm after
        the block, where these are needed.
        """
        handles = []
        if depth is Depth.INPUTS:
            handles.append(self.block.output.linear.register_forward_pre_hook(self._observe_input))
        elif self.block.parent is not None:
            handles.append(self.block.parent.register_forward_pre_hook(self._enter, with_kwargs=True))
        if self._norm is not None and depth >= Depth.MASKS:
            handles.append(self._norm.register_forward_hook(self._observe_norm))
        with hooks_removed(handles):
            yield

    @property
    def _norm(self) -> nn.Module | None:
        """The norm after the block; None if there is none, or if another block's output enters it too."""
        return self.block.norm if self.block.parent is None else None

    def _observe_norm(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        """Forward hook of the norm after the block; the backward pass reaches the norm before the block's projections.

        The gate is on the norm's output: a gate on its input would have zero gradient, because the norm divides the
        gate's factor out again.
        """
        if output.requires_grad:
            y = output.detach()
            output.register_hook(lambda dy: self._observe_gate(y, dy))

    @torch.no_grad()
    def _observe_gate(self, y: Tensor, dy: Tensor) -> None:
        """Record the gate's gradient; y: [N, T, H], what is added to the residual stream; dy: its gradient."""
        self.pending.gate = self._reduced(self._ops.mask_gradient(y, dy).gradient.sum(1, dtype=torch.float64))

    def _observe_input(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the output projection that sums its input's squares in passes without gradients."""
        x = args[0].detach().flatten(0, -2)
        self._added.input_square += x.to(accumulation_dtype(x)).square().sum(0)
        self._pending_tokens += x.shape[0]

    def curvatures(self, samples: int) -> Tensor:
        """[1]: the curvature of the output projection, see `BlockAccumulator.curvatures`."""
        mean: Tensor = self.sums.output_square / (samples * self.block.output.weight.shape[0])
        return mean

    @abstractmethod
    def _observe_weight(self, entry: InputLinear | OutputLinear, x: Tensor, dy: Tensor) -> None:
        """Accumulate from the gradient of one linear layer's weight; x: [N, T, I], dy: [N, T, O]."""

    @abstractmethod
    def _reduced(self, of_samples: Tensor) -> Tensor:
        """The step's gradients [gradients, ...], from the samples' own [N, ...]: N of them, or one, their mean."""

    def _observe(self, entry: InputLinear | OutputLinear, x: Tensor, dy: Tensor, dx: Tensor) -> None:
        """Accumulate from one linear layer's backward pass; x: [N, T, I], dy: [N, T, O], dx: [N, T, I]."""
        self._observe_weight(entry, x, dy)
        if isinstance(entry, OutputLinear):
            self._observe_output(x, dy, dx)

    def _observe_output(self, x: Tensor, dy: Tensor, dx: Tensor) -> None:
        """Accumulate what the output projection's backward pass gives without a weight gradient; see `_observe`."""
        of_bias = None if self.block.output.linear.bias is None else self._reduced(dy.sum(1))
        self._observe_mask(self._reduced(self._input_gradient(x, dx)), of_bias)
        if self._curvature:
            norm_of(dy, self._added.output_square[0])

    def _accumulate(self, entry: InputLinear | OutputLinear, vectors: ImportanceVectors) -> None:
        sums = vectors.sums(_side(entry))
        if isinstance(entry, OutputLinear):
            self._pending_vectors.append(entry.by_group(sums))
        else:
            self._pending_vectors += entry.by_group(sums, self.block.groups)
        self.pending.statistics[entry.path] = vectors.statistics

    def _fold(self, entry: InputLinear | OutputLinear, vector: Tensor) -> Tensor:
        """[groups]: a vector over the entry's rows (an output projection's columns), summed by group."""
        if isinstance(entry, OutputLinear):
            return entry.fold_columns(vector)
        return entry.fold_rows(vector, self.block.groups)

    def _input_gradient(self, x: Tensor, dx: Tensor) -> Tensor:
        """[N, I]: each sample's gradient of a mask on the output projection's input; also sums the input's squares."""
        found = self._ops.mask_gradient(x, dx)
        torch.sum(found.input_square, 0, dtype=torch.float64, out=self._added.input_square)
        self._pending_tokens += x.shape[0] * x.shape[1]
        return found.gradient

    def _observe_mask(self, mask_gradient: Tensor, dy: Tensor | None) -> None:
        """Accumulate the squared gradients of masks on the groups, and record the gradient of the block's gate.

        Args:
            mask_gradient: [gradients, I], the gradients of a mask on each input column.
            dy: [gradients, O], the gradients of the output, summed over tokens; needed if the projection has a bias.
        """
        entry = self.block.output
        by_group = entry.fold_columns(mask_gradient)
        if self._norm is None:
            gate = by_group.sum(1, dtype=torch.float64)
            if dy is not None and entry.linear.bias is not None:
                gate = gate + dy.double() @ entry.linear.bias.detach().double()
            self.pending.gate = gate
        elif self.pending.gate is not None and self.block.groups == 1:
            # A mask on the only group acts as the gate, because without this group the block adds nothing. Measured
            # before the norm, the mask's gradient would be mere rounding error.
            by_group = self.pending.gate[:, None]
        torch.linalg.vector_norm(by_group, dim=0, dtype=torch.float64, out=self._added.mask_square)

    def _folded_weights(self, column_scale: Tensor | None) -> Tensor:
        """[groups] fp64: the sum of |w| over each group, see `BlockAccumulator._folded_weights`."""
        output = self.block.output
        columns = absolute_sums(output.weight, 0)
        if column_scale is not None:
            return output.fold_columns(columns * column_scale)
        total = output.fold_columns(columns)
        for entry in self.block.inputs:
            rows = absolute_sums(entry.weight, 1)
            total = total + entry.fold_rows(rows, self.block.groups)
        return total


class SampleAccumulator(LinearAccumulator):
    """Accumulator of each sample's own gradient: a running sum per group is enough, so no gradient is kept."""

    def _observe_weight(self, entry: InputLinear | OutputLinear, x: Tensor, dy: Tensor) -> None:
        left, right = _as_stored(entry, x, dy)
        self._accumulate(entry, self._ops.linear_importance_uncounted(right, left, entry.linear.weight, _side(entry)))

    def _reduced(self, of_samples: Tensor) -> Tensor:
        return of_samples

    def _first_order(self, count: int) -> Tensor:
        return self.sums.first / count


class BatchAccumulator(LinearAccumulator):
    """Accumulator of each batch's mean-loss gradient, summed per weight because the first-order term needs its mean."""

    def __init__(self, block: LinearBlock, ops: ImportanceOps, curvature: bool = False) -> None:
        """See `BlockAccumulator`; also keeps a gradient sum per weight and, until `commit`, the pending gradient."""
        self._gradient_sums: dict[str, Tensor] = {}
        super().__init__(block, ops, curvature)

    def discard(self) -> None:
        """Drop the current step's contributions that are not stored in the ledger."""
        super().discard()
        self._pending_gradients: dict[str, Tensor] = {}

    @torch.no_grad()
    def finish(self, factor: float) -> None:
        """See `LinearAccumulator.finish`; the pending gradients are divided by `factor`, too."""
        super().finish(factor)
        if factor != 1.0:
            for gradient in self._pending_gradients.values():
                gradient /= factor

    def commit(self, scale: float) -> None:
        """See `BlockAccumulator.commit`; also add the pending gradients to the gradient sums."""
        for path, gradient in self._pending_gradients.items():
            scaled = gradient if scale == 1.0 else gradient.mul_(scale)
            if path in self._gradient_sums:
                self._gradient_sums[path] += scaled
            else:
                self._gradient_sums[path] = scaled
        super().commit(scale)

    def state(self) -> dict[str, Tensor]:
        """All committed sums, gradient sums and records, by name, for `restore`."""
        sums = {f"gradients.{path}": gradient for path, gradient in self._gradient_sums.items()}
        return {**super().state(), **sums}

    def restore(self, state: dict[str, Tensor], gradients: list[int]) -> None:
        """Resume from another accumulator's `state`; `gradients`: the number of gradients in each step."""
        super().restore(state, gradients)
        prefix = "gradients."
        self._gradient_sums = {
            name.removeprefix(prefix): value.to(self.sums.weights.device)
            for name, value in state.items()
            if name.startswith(prefix)
        }

    def _observe_weight(self, entry: InputLinear | OutputLinear, x: Tensor, dy: Tensor) -> None:
        samples = x.shape[0]
        dtype = accumulation_dtype(entry.linear.weight)
        gradient = torch.zeros_like(entry.linear.weight, dtype=dtype, requires_grad=False)
        left, right = _as_stored(entry, x, dy)
        add_product(gradient, left.flatten(0, 1), right.flatten(0, 1))
        gradient /= samples
        self._accumulate(entry, self._ops.taylor_score(entry.linear.weight, gradient, _side(entry)))
        self._pending_gradients[entry.path] = gradient

    def _reduced(self, of_samples: Tensor) -> Tensor:
        return of_samples.mean(0, keepdim=True)

    def _first_order(self, count: int) -> Tensor:
        total = torch.zeros_like(self.sums.second)
        for entry in self.block.projections:
            mean = self._gradient_sums[entry.path] / count
            vectors = self._ops.taylor_score(entry.linear.weight.detach(), mean, _side(entry))
            total += self._fold(entry, vectors.sums(_side(entry))[0])
        return total


def _of_first_steps(values: Tensor, gradients: Sequence[int]) -> tuple[Tensor, ...]:
    """Split `values`, one per gradient of the first steps, by step; `gradients`: their number in each step."""
    ends = list(itertools.accumulate(gradients))
    of_steps: tuple[Tensor, ...] = values.split(list(gradients[: 1 + ends.index(len(values))]))
    return of_steps


def norm_of(values: Tensor, into: Tensor) -> None:
    """Write the L2 norm of all of `values`, [..., O], into `into`, [] fp64, reading the values once."""
    # The norm of each row is computed first, so that no sum is split between threads.
    rows = torch.linalg.vector_norm(values, dim=-1, dtype=accumulation_dtype(values))
    torch.linalg.vector_norm(rows, dtype=torch.float64, out=into)


def _side(entry: InputLinear | OutputLinear) -> Literal["rows", "columns"]:
    """Whether groups own rows or columns of the stored weight; an input projection's rows, swapped if transposed."""
    return "columns" if isinstance(entry, OutputLinear) != entry.transposed else "rows"


def _as_stored(entry: InputLinear | OutputLinear, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (left, right) of the stored weight's gradient left^T right; no transposed weight needs a copy."""
    return (x, dy) if entry.transposed else (dy, x)
