"""What one block accumulates over calibration: a handful of vectors over its groups, in fp64."""

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

    by_name: all of them. weights: [2, groups], `first` and `second`.
    first: [groups], sum of |w g| over the group's elements, as far as it can be summed step by step.
    second: [groups], sum of w^2 g^2 over the group's elements.
    mask_square: [groups], sum of (sum of w g over the group's output columns)^2, the squared gradient of a
        mask on the group.
    input_square: [I], sum of x^2 at the output projection.
    output_square: [outputs], sum of dy^2 at each output projection, of each sample's own loss, where curvatures are
        collected.
    """

    def __init__(self, block: Block, norms: Tensor, rest: Tensor, more: Sequence[str] = ()) -> None:
        """Views of `norms` and `rest`, of an accumulator's `sizes`.

        more: names of further sums, [groups].
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
        """As if the gradients had been multiplied by `factor`."""
        self.first *= factor
        for square in (self.second, self.mask_square, self.output_square):
            square *= factor**2


@dataclass
class StepRecord:
    """What a block records of one step's gradients, in addition to its sums.

    statistics: per linear layer, those of its gradients; empty if no weight's gradient was taken.
    gate: the gradient of a gate on what the block adds to the residual stream: [N] by sample, or [1] by batch; None
        without gradients.
    scale: what the step's gradients were multiplied by.
    """

    statistics: dict[str, GradientStatistics[Tensor]] = field(default_factory=dict)
    gate: Tensor | None = None
    scale: float = 1.0


class BlockAccumulator(ABC):
    """One block's sums, which lie in a ledger, and a record of each step.

    A step's contributions stay pending until `commit`: a failed step is discarded as a whole, and the scale of a
    batch's gradients is known only once all layers' gradients are.

    sums: of the steps so far. tokens: over how many tokens `sums.input_square` is.
    records: of the steps so far. pending: of the current step.
    more_sums: the names of further sums over the steps, [groups].
    """

    more_sums: tuple[str, ...] = ()
    # Whether sums of squares are given to the ledger as norms, which it squares, those of all blocks at once.
    _gives_norms = False

    def __init__(self, block: Block, ops: ImportanceOps, curvature: bool = False) -> None:
        """`ops` computes the vectors of one weight's gradient.

        curvature: collect what `gradprune.calibration.obs` needs of the gradients.
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
        """Numbers that its sums take of a ledger: of norms, and of others."""
        squares = self.block.groups + self.block.outputs
        others = (2 + len(self.more_sums)) * self.block.groups + self.block.width
        return (squares, others) if self._gives_norms else (0, squares + others)

    def open(self, sums: BlockSums, pending: BlockSums) -> None:
        """Take parts of a ledger, which are zero."""
        self.sums, self._added = sums, pending

    def discard(self) -> None:
        """Drop what is pending beside the sums."""
        self.pending = StepRecord()
        self._pending_tokens = 0

    @torch.no_grad()
    def finish(self, factor: float) -> None:
        """The step's backward pass is over, and its gradients are `factor` times too large, a power of two."""
        if factor == 1.0:
            return
        self._added.multiply(1.0 / factor)
        if self.pending.gate is not None:
            self.pending.gate /= factor
        for path, found in self.pending.statistics.items():
            self.pending.statistics[path] = found.scale(1.0 / factor)

    def commit(self, scale: float) -> None:
        """The pending sums are about to be added, as if the step's gradients had been multiplied by `scale`."""
        if scale != 1.0:
            self._added.multiply(scale)
        self.tokens += self._pending_tokens
        self.pending.scale = scale
        self.records.append(self.pending)

    def state(self) -> dict[str, Tensor]:
        """Everything committed so far, by name."""
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
        """Resume from a `state`; `gradients`: the number of gradients in each step."""
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
        """The linear layers that steps of that depth observe in the backward pass, with their observers."""
        return iter(())

    @abstractmethod
    def attached(self, depth: Depth) -> AbstractContextManager[Any]:
        """Inside the context everything else that steps of `depth` need is observed."""

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the batch's shape, before the tokens of all samples are put into one row."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self._shape = hidden.shape[:-1]

    def component(self, name: str, count: int) -> Tensor:
        """[groups] fp64, a component that steps collect, see `gradprune.calibration.methods`, of `count` gradients."""
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
        """[outputs], mean over samples of the diagonal mean of sum over tokens dy dy^T of each output projection.

        See `gradprune.calibration.obs`.
        """

    @abstractmethod
    def _first_order(self, count: int) -> Tensor:
        """[groups] fp64, the component "taylor" of `count` gradients."""

    @abstractmethod
    def _folded_weights(self, column_scale: Tensor | None) -> Tensor:
        """Sum of |w| over each group: all its elements, or, with a scale per column, its output columns only."""


def absolute_sums(weight: Tensor, dim: int) -> Tensor:
    """[I] or [O] fp64, the sums of |w| of a weight [O, I] along dimension 0 or 1, some rows at a time."""
    parts = weight.detach().split(max(1, FOLDED // weight.shape[1]))
    sums = [part.double().abs().sum(dim) for part in parts]
    return torch.cat(sums) if dim else torch.stack(sums).sum(0)


class LinearAccumulator(BlockAccumulator):
    """A block of plain linear layers, each of which is observed once a step."""

    block: LinearBlock
    _gives_norms = True

    def discard(self) -> None:
        """Drop the pending contributions of the current step."""
        super().discard()
        # For each weight its sums by group, [2, groups, rows or columns of a group].
        self._pending_vectors: list[Tensor] = []

    @torch.no_grad()
    def finish(self, factor: float) -> None:
        """The step's backward pass is over, and its gradients are `factor` times too large, a power of two."""
        if self._pending_vectors:
            # All weights at once, because on a GPU each sum would be a launch.
            torch.sum(torch.cat(self._pending_vectors, 2), 2, dtype=torch.float64, out=self._added.weights)
            self._pending_vectors = []
        super().finish(factor)

    def observers(self, depth: Depth) -> Iterator[tuple[nn.Linear, Observer]]:
        """The linear layers that steps of `depth` observe in the backward pass, with their observers."""
        if depth is Depth.WEIGHTS:
            for entry in self.block.projections:
                yield entry.linear, self._by_sample(partial(self._observe, entry))
        else:
            yield self.block.output.linear, self._by_sample(self._observe_output)

    def _by_sample(self, observer: Observer) -> Observer:
        """The observer, which needs [N, T, ...], of a layer that may read the tokens of all samples in one row."""
        if self.block.parent is None:
            return observer
        return lambda x, dy, dx: observer(*(each.view(*self._shape, -1) for each in (x, dy, dx)))

    @contextmanager
    def attached(self, depth: Depth) -> Iterator[None]:
        """In passes without gradients, the output projection's input is observed; in others, the batch's shape."""
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
        """The norm after the block, where no other block's output enters it."""
        return self.block.norm if self.block.parent is None else None

    def _observe_norm(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        """Forward hook of the norm after the block, whose gradient comes before that of the block's projections.

        A gate before the norm would have no gradient, whatever the block adds: the norm takes its factor out again.
        """
        if output.requires_grad:
            y = output.detach()
            output.register_hook(lambda dy: self._observe_gate(y, dy))

    @torch.no_grad()
    def _observe_gate(self, y: Tensor, dy: Tensor) -> None:
        """y: [N, T, H], what is added; dy: its gradient."""
        self.pending.gate = self._reduced(self._ops.mask_gradient(y, dy).gradient.sum(1, dtype=torch.float64))

    def _observe_input(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the output projection, for passes without gradients: the second moment of its input."""
        x = args[0].detach().flatten(0, -2)
        self._added.input_square += x.to(accumulation_dtype(x)).square().sum(0)
        self._pending_tokens += x.shape[0]

    def curvatures(self, samples: int) -> Tensor:
        """[1], that of its output projection."""
        mean: Tensor = self.sums.output_square / (samples * self.block.output.weight.shape[0])
        return mean

    @abstractmethod
    def _observe_weight(self, entry: InputLinear | OutputLinear, x: Tensor, dy: Tensor) -> None:
        """Accumulate from the gradient of one linear layer's weight; x: [N, T, I], dy: [N, T, O]."""

    @abstractmethod
    def _reduced(self, of_samples: Tensor) -> Tensor:
        """[gradients, ...] from the samples' own gradients, [N, ...]."""

    def _observe(self, entry: InputLinear | OutputLinear, x: Tensor, dy: Tensor, dx: Tensor) -> None:
        """Accumulate from one linear layer's backward pass; x: [N, T, I], dy: [N, T, O], dx: [N, T, I]."""
        self._observe_weight(entry, x, dy)
        if isinstance(entry, OutputLinear):
            self._observe_output(x, dy, dx)

    def _observe_output(self, x: Tensor, dy: Tensor, dx: Tensor) -> None:
        """As `_observe`, of the output projection, without its weight's gradient."""
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
        """[groups], a vector over the entry's rows (columns of an output projection) summed by group."""
        if isinstance(entry, OutputLinear):
            return entry.fold_columns(vector)
        return entry.fold_rows(vector, self.block.groups)

    def _input_gradient(self, x: Tensor, dx: Tensor) -> Tensor:
        """[N, I], the gradient of a mask on the output projection's input; also sums the input's second moment."""
        found = self._ops.mask_gradient(x, dx)
        torch.sum(found.input_square, 0, dtype=torch.float64, out=self._added.input_square)
        self._pending_tokens += x.shape[0] * x.shape[1]
        return found.gradient

    def _observe_mask(self, mask_gradient: Tensor, dy: Tensor | None) -> None:
        """mask_gradient: [gradients, I], of a mask on each input column; dy: [gradients, O], summed over tokens.

        dy is needed where the output projection has a bias.
        """
        entry = self.block.output
        by_group = entry.fold_columns(mask_gradient)
        if self._norm is None:
            gate = by_group.sum(1, dtype=torch.float64)
            if dy is not None and entry.linear.bias is not None:
                gate = gate + dy.double() @ entry.linear.bias.detach().double()
            self.pending.gate = gate
        elif self.pending.gate is not None and self.block.groups == 1:
            # Without its only group nothing is added. Before the norm, the gradient of a mask on it is rounding error.
            by_group = self.pending.gate[:, None]
        torch.linalg.vector_norm(by_group, dim=0, dtype=torch.float64, out=self._added.mask_square)

    def _folded_weights(self, column_scale: Tensor | None) -> Tensor:
        """Sum of |w| over each group: all its elements, or, with a scale per column, its output columns only."""
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
    """Scores each sample's own gradient: running sums per group suffice, and no gradient is kept."""

    def _observe_weight(self, entry: InputLinear | OutputLinear, x: Tensor, dy: Tensor) -> None:
        left, right = _as_stored(entry, x, dy)
        self._accumulate(entry, self._ops.linear_importance_uncounted(right, left, entry.linear.weight, _side(entry)))

    def _reduced(self, of_samples: Tensor) -> Tensor:
        return of_samples

    def _first_order(self, count: int) -> Tensor:
        return self.sums.first / count


class BatchAccumulator(LinearAccumulator):
    """Scores the gradient of each batch's mean loss. The first-order term needs the mean gradient, which is kept."""

    def __init__(self, block: LinearBlock, ops: ImportanceOps, curvature: bool = False) -> None:
        """As `BlockAccumulator`; one gradient per weight is kept, and the pending one until `commit`."""
        self._gradient_sums: dict[str, Tensor] = {}
        super().__init__(block, ops, curvature)

    def discard(self) -> None:
        """Drop the pending contributions of the current step."""
        super().discard()
        self._pending_gradients: dict[str, Tensor] = {}

    @torch.no_grad()
    def finish(self, factor: float) -> None:
        """The step's backward pass is over, and its gradients are `factor` times too large, a power of two."""
        super().finish(factor)
        if factor != 1.0:
            for gradient in self._pending_gradients.values():
                gradient /= factor

    def commit(self, scale: float) -> None:
        """As of any accumulator; the pending gradients are added, too."""
        for path, gradient in self._pending_gradients.items():
            scaled = gradient if scale == 1.0 else gradient.mul_(scale)
            if path in self._gradient_sums:
                self._gradient_sums[path] += scaled
            else:
                self._gradient_sums[path] = scaled
        super().commit(scale)

    def state(self) -> dict[str, Tensor]:
        """Everything committed so far, by name."""
        sums = {f"gradients.{path}": gradient for path, gradient in self._gradient_sums.items()}
        return {**super().state(), **sums}

    def restore(self, state: dict[str, Tensor], gradients: list[int]) -> None:
        """Resume from a `state`; `gradients`: the number of gradients in each step."""
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
    """Values of the first steps' gradients, split by step; `gradients`: the number in each step."""
    ends = list(itertools.accumulate(gradients))
    of_steps: tuple[Tensor, ...] = values.split(list(gradients[: 1 + ends.index(len(values))]))
    return of_steps


def norm_of(values: Tensor, into: Tensor) -> None:
    """Put the root of the sum of squares of `values`, [..., O], into `into`, [] fp64, in one read of them."""
    # Each row first, so that no sum is split between threads.
    rows = torch.linalg.vector_norm(values, dim=-1, dtype=accumulation_dtype(values))
    torch.linalg.vector_norm(rows, dtype=torch.float64, out=into)


def _side(entry: InputLinear | OutputLinear) -> Literal["rows", "columns"]:
    """Groups own rows of input projections and columns of the output projection; of the weight as it is stored."""
    return "columns" if isinstance(entry, OutputLinear) != entry.transposed else "rows"


def _as_stored(entry: InputLinear | OutputLinear, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of the weight's gradient left^T right as it is stored, so that no weight is copied."""
    return (x, dy) if entry.transposed else (dy, x)
