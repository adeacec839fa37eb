"""The prunable blocks of a loaded model: which rows and columns of which weights form each group."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models.kinds import BlockKey, Kind
from gradprune.models.modeling_gradprune import adds_residual, norms_of, stored_transposed, weight_of
from gradprune.models.modes import value_replaced, values_restored
from gradprune.models.residency import Residency, residency_of


@dataclass(frozen=True)
class Part:
    """Consecutive rows of an input projection: group g owns rows `offset + g*rows ... offset + (g+1)*rows`.

    name: "q", "k" or "v" in attention, or "qkv" if the three are stored together for each KV head; "gate" or "up" in an
        MLP.
    """

    name: str
    offset: int
    rows: int


@dataclass(frozen=True)
class Projection:
    """A linear layer of a block; path: its attribute path in the block."""

    path: str
    linear: nn.Linear

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [I, O]."""
        return stored_transposed(self.linear)

    @property
    def weight(self) -> Tensor:
        """The weight [O, I], or a view if it is stored transposed: changing it in place always changes the layer."""
        found: Tensor = weight_of(self.linear)
        return found

    def cut(self, rows: Tensor | None, columns: Tensor | None) -> "Iterator[Cut]":
        """Yield the cuts that keep these rows of weight and bias, or these columns of the weight; None keeps all."""
        if rows is not None:
            yield Cut(f"{self.path}.weight", int(self.transposed), rows)
            if self.linear.bias is not None:
                yield Cut(f"{self.path}.bias", 0, rows)
        if columns is not None:
            yield Cut(f"{self.path}.weight", int(not self.transposed), columns)


@dataclass(frozen=True)
class InputLinear(Projection):
    """An input projection of a block, whose rows are divided into `parts`."""

    parts: tuple[Part, ...]

    def rows_of(self, groups: Tensor) -> Tensor:
        """Indices of the rows that `groups` ([k] int64, ascending) own, part by part: [k * sum of part.rows] int64."""
        spans = [
            (part.offset + groups[:, None] * part.rows + torch.arange(part.rows)).reshape(-1) for part in self.parts
        ]
        return torch.cat(spans)

    def by_group(self, rows: Tensor, groups: int) -> list[Tensor]:
        """Split `rows` [..., O], one number per row, into a view [..., groups, rows of a group] for each part."""
        ends = [(part, part.offset + groups * part.rows) for part in self.parts]
        return [rows[..., part.offset : end].unflatten(-1, (groups, part.rows)) for part, end in ends]

    def fold_rows(self, rows: Tensor, groups: int) -> Tensor:
        """Sum a vector over rows [O] into a vector over groups [groups] of the same dtype."""
        folded = [part.sum(-1) for part in self.by_group(rows, groups)]
        return folded[0] if len(folded) == 1 else torch.stack(folded).sum(0)


@dataclass(frozen=True)
class Rider:
    """A parameter that is not a projection but has rows for every head, such as sinks.

    Group g owns rows `g*rows ... (g+1)*rows`. path: the parameter's path in the block.
    """

    path: str
    parameter: nn.Parameter
    rows: int

    def rows_of(self, groups: Tensor) -> Tensor:
        """Indices of the rows that `groups` ([k] int64, ascending) own: [k * rows] int64."""
        return (groups[:, None] * self.rows + torch.arange(self.rows)).reshape(-1)


@dataclass(frozen=True)
class OutputLinear(Projection):
    """The output projection of a block; group g owns columns `g*columns ... (g+1)*columns`."""

    columns: int

    def columns_of(self, groups: Tensor) -> Tensor:
        """Indices of the columns that `groups` ([k] int64, ascending) own: [k * columns] int64."""
        return (groups[:, None] * self.columns + torch.arange(self.columns)).reshape(-1)

    def by_group(self, columns: Tensor) -> Tensor:
        """View `columns` [..., I], one number per column, as [..., groups, columns of a group]."""
        return columns.view(*columns.shape[:-1], -1, self.columns)

    def fold_columns(self, columns: Tensor) -> Tensor:
        """Sum `columns` [..., I] over the columns of each group: [..., groups], same dtype."""
        return columns if self.columns == 1 else self.by_group(columns).sum(-1)


@dataclass(frozen=True)
class Cut:
    """What remains of one parameter or buffer when groups are removed.

    path: the path of the parameter or buffer in the block. dim: the dimension that gets shorter. index: the indices
    kept along `dim`: [k] int64, or [E, k] if each entry of the first dimension keeps different ones.
    """

    path: str
    dim: int
    index: Tensor


def take_columns(tensor: Tensor, columns: Tensor) -> Tensor:
    """Copy `columns` ([K] int64) of a tensor [..., I] to [..., K]; on a CPU, in a third of the time of indexing."""
    return tensor.gather(-1, columns.expand(*tensor.shape[:-1], -1))


def writing(block: nn.Module, output: nn.Module) -> nn.Module:
    """Return the `Block.module` of a block, given its output projection.

    A block that adds its output to the residual stream itself returns the sum, so its output projection is the module
    that returns what is added.
    """
    return output if adds_residual(block) else block


def added(layer: nn.Module, module: nn.Module, kind: str) -> tuple[float | None, nn.Module]:
    """Return `Block.adds` and `Block.writer` for a block of a decoder layer, given its `Block.module`."""
    _, after = norms_of(layer, kind)
    if after is not None:
        return None, getattr(layer, after)
    return float(getattr(layer, "residual_multiplier", 1.0)), module


@dataclass(frozen=True)
class Block(ABC):
    """One block of a decoder layer, with `groups` prunable groups.

    path: the attribute of the decoder layer to which the paths of the block's parameters are relative.
    module: the module that computes the block's output.
    cost: the number of parameters removed with one group, biases included.
    adds: the factor by which the block's output is multiplied before it is added to the residual stream; None if it is
        not a constant, because a norm or a gate on each token stands in between.
    writer: the module whose output is added: `module`, or the norm after the block.
    """

    kind: Kind
    layer: int
    path: str
    module: nn.Module
    groups: int
    cost: int
    adds: float | None
    writer: nn.Module

    @property
    def key(self) -> BlockKey:
        """The key that identifies the block in mappings."""
        return BlockKey(self.layer, self.kind.name)

    @property
    def sets(self) -> int:
        """The number of equal, consecutive sets that the groups form; all sets must keep equally many groups."""
        return 1

    @property
    def norm(self) -> nn.Module | None:
        """The norm after the block, whose output is added to the residual stream; None if there is no such norm."""
        return None if self.writer is self.module else self.writer

    @property
    def min_kept(self) -> int:
        """The smallest number of groups that each set may keep, unless the whole block is removed."""
        return 1

    @property
    def outputs(self) -> int:
        """The number of the block's output projections."""
        return 1

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of columns of the output projection; for experts, of all their output projections together."""

    @property
    def read_width(self) -> int:
        """How many numbers the output projections read for each token."""
        return self.width

    @property
    @abstractmethod
    def solved_columns(self) -> int:
        """Number of columns that the repair solves for together; 0 if it never warns about too few tokens."""

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, int]]:
        """Yield each prunable weight's path in the block and its number of elements."""

    @abstractmethod
    def output_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the output projection's parameters that masking changes, with their paths in the block."""

    @abstractmethod
    def mask(self, kept: Tensor) -> None:
        """Zero in place the weights by which groups not `kept` ([groups] bool) write; the bias too if none is kept."""

    @contextmanager
    def masked(self, kept: Tensor) -> Iterator[None]:
        """Context manager in which the block computes what it would compute if it were cut.

        kept: [groups] bool. The block's weights have to be in memory.
        """
        with values_restored(parameter for _, parameter in self.output_parameters()):
            self.mask(kept)
            yield

    @abstractmethod
    def writing_by(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Context manager that replaces the output projections, which are in memory, by `weights`, each [O, I]."""

    @abstractmethod
    def cuts(self, groups: Tensor) -> Iterator[Cut]:
        """Yield what remains of the block's parameters and buffers when only `groups` ([k] int64, ascending) stay."""


@dataclass(frozen=True)
class LinearBlock(Block):
    """A block of plain linear layers.

    inputs, output: the projections; rows of `inputs` and columns of `output` belong to groups.
    head_dim: the width of an attention head; 1 if a group is a single channel.
    riders: parameters other than projections that are cut with the groups.
    follows: for shared experts whose width the configuration states as a multiple of the routed experts' width, that
        multiple; else 0.
    parent: for shared experts, the module that calls them, which may flatten the tokens of all samples into one
        dimension; None for other blocks, and for shared experts that the decoder layer calls itself.
    """

    inputs: tuple[InputLinear, ...]
    output: OutputLinear
    head_dim: int
    riders: tuple[Rider, ...]
    follows: int = 0
    parent: nn.Module | None = None

    @property
    def heads_per_group(self) -> int:
        """Number of query heads per KV head; 1 in an MLP."""
        return self.output.columns // self.head_dim

    @property
    def projections(self) -> "tuple[InputLinear | OutputLinear, ...]":
        """The prunable linear layers of the block, the output projection last."""
        return (*self.inputs, self.output)

    @property
    def width(self) -> int:
        """Number of columns of the output projection."""
        return self.output.weight.shape[1]

    @property
    def solved_columns(self) -> int:
        """Number of columns of the output projection, for which the repair solves together."""
        return self.width

    def weights(self) -> Iterator[tuple[str, int]]:
        """Yield the path and the number of elements of each projection's weight."""
        for entry in self.projections:
            yield entry.path, entry.linear.weight.numel()

    def output_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the output projection's weight and bias with their paths in the block."""
        for name, parameter in self.output.linear.named_parameters():
            yield f"{self.output.path}.{name}", parameter

    @torch.no_grad()
    def mask(self, kept: Tensor) -> None:
        """Zero the columns of groups that are not kept; if none is kept, the bias too: cutting would drop the block."""
        linear, weight = self.output.linear, self.output.weight
        weight[:, self.output.columns_of((~kept).nonzero().flatten()).to(weight.device)] = 0.0
        if linear.bias is not None and not kept.any():
            linear.bias.zero_()

    def writing_by(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Context manager that replaces the output projection's weight by the only one of `weights`, [O, I]."""
        (weight,) = weights
        stored = weight.T if self.output.transposed else weight
        return value_replaced(self.output.linear.get_parameter("weight"), stored)

    def cuts(self, groups: Tensor) -> Iterator[Cut]:
        """Yield the cuts of the input projections' and riders' rows, and of the output projection's columns."""
        for entry in self.inputs:
            yield from entry.cut(entry.rows_of(groups), None)
        for rider in self.riders:
            yield Cut(rider.path, 0, rider.rows_of(groups))
        yield from self.output.cut(None, self.output.columns_of(groups))


@dataclass(frozen=True)
class PrunableModel:
    """A model and its prunable blocks. Cutting or replacing a block makes this stale: `describe` the model again.

    blocks: the existing blocks, in the order in which they add to the residual stream.
    dropped: the blocks that an earlier pruning removed, which are not among `blocks`.
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    blocks: tuple[Block, ...]
    dropped: frozenset[BlockKey]

    def of_layer(self, layer: int) -> tuple[Block, ...]:
        """The existing blocks of one decoder layer, in the order of `blocks`."""
        return tuple(block for block in self.blocks if block.layer == layer)

    def of_kind(self, kind: str) -> list[LinearBlock | None]:
        """For each decoder layer, its linear block of the kind named `kind`; None if it has none."""
        found = {block.layer: block for block in self.linear_blocks if block.kind.name == kind}
        return [found.get(layer) for layer in range(len(self.layers))]

    @property
    def linear_blocks(self) -> tuple[LinearBlock, ...]:
        """The blocks of plain linear layers."""
        return tuple(block for block in self.blocks if isinstance(block, LinearBlock))

    @property
    def has_experts(self) -> bool:
        """Whether there are blocks of routed experts among the prunable blocks."""
        return len(self.linear_blocks) < len(self.blocks)

    def with_groups(self) -> "PrunableModel":
        """Return this object, after checking that there is something left to prune.

        Raises:
            UnsupportedArchitectureError: earlier prunings removed every block.
        """
        if not self.blocks:
            raise UnsupportedArchitectureError(
                "base_model: has no KV group and no MLP channel left to prune; name an earlier checkpoint of it"
            )
        return self

    @property
    def prunable(self) -> int:
        """Number of parameters of all groups together."""
        return sum(block.groups * block.cost for block in self.blocks)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of the whole model; tied parameters count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def device(self) -> torch.device:
        """The model's device; if the model is spread over several devices, the device of its embedding."""
        return self.model.device

    @cached_property
    def spread(self) -> bool:
        """Whether the model is spread over several devices; a streamed model never is."""
        return self.residency is None and len({parameter.device for parameter in self.model.parameters()}) > 1

    def device_of(self, layer: int) -> torch.device:
        """The device on which a decoder layer runs."""
        return next(self.layers[layer].parameters()).device if self.spread else self.device

    @property
    def residency(self) -> Residency | None:
        """What loads and releases the layers of a streamed model; None for a model that is whole in memory."""
        return residency_of(self.model)

    def resident(self, layer: int, then: int | None = None) -> AbstractContextManager[None]:
        """Context manager that holds the weights of a decoder layer in memory; see `Residency.resident`."""
        return nullcontext() if self.residency is None else self.residency.resident(layer, then)

    @contextmanager
    def rewriting(self, block: Block, paths: Sequence[str]) -> Iterator[None]:
        """Context manager in which parameters of a block can be changed in place, permanently.

        paths: the parameters' paths in the block. They get memory of their own, so that another model that shared their
        memory stays as it is.
        """
        with self.resident(block.layer, block.layer + 1):
            for path in paths:
                parameter = self.layers[block.layer].get_parameter(f"{block.path}.{path}")
                parameter.data = parameter.detach().clone()
            yield
            if self.residency is not None:
                for path in paths:
                    self.residency.replace(block.layer, f"{block.path}.{path}")
