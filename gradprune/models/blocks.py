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

    name: "q", "k", "v" in attention, or "qkv" where each KV head has these together; "gate", "up" in an MLP.
    """

    name: str
    offset: int
    rows: int


@dataclass(frozen=True)
class Projection:
    """A linear layer of a block: its attribute path in the block, and its module."""

    path: str
    linear: nn.Linear

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored [I, O]."""
        return stored_transposed(self.linear)

    @property
    def weight(self) -> Tensor:
        """[O, I], a view where it is stored transposed; changing it in place changes the layer."""
        found: Tensor = weight_of(self.linear)
        return found

    def cut(self, rows: Tensor | None, columns: Tensor | None) -> "Iterator[Cut]":
        """What remains of the weight and the bias when these rows, or these columns, stay."""
        if rows is not None:
            yield Cut(f"{self.path}.weight", int(self.transposed), rows)
            if self.linear.bias is not None:
                yield Cut(f"{self.path}.bias", 0, rows)
        if columns is not None:
            yield Cut(f"{self.path}.weight", int(not self.transposed), columns)


@dataclass(frozen=True)
class InputLinear(Projection):
    """An input projection of a block: its parts, beside the linear layer."""

    parts: tuple[Part, ...]

    def rows_of(self, groups: Tensor) -> Tensor:
        """Row indices owned by `groups` ([k] int64, ascending), part by part: [k * sum of part.rows] int64."""
        spans = [
            (part.offset + groups[:, None] * part.rows + torch.arange(part.rows)).reshape(-1) for part in self.parts
        ]
        return torch.cat(spans)

    def by_group(self, rows: Tensor, groups: int) -> list[Tensor]:
        """Views of [..., O], a number per row: for each part [..., groups, rows of a group]."""
        ends = [(part, part.offset + groups * part.rows) for part in self.parts]
        return [rows[..., part.offset : end].unflatten(-1, (groups, part.rows)) for part, end in ends]

    def fold_rows(self, rows: Tensor, groups: int) -> Tensor:
        """Sum a vector over rows [O] into one over groups [groups], same dtype."""
        folded = [part.sum(-1) for part in self.by_group(rows, groups)]
        return folded[0] if len(folded) == 1 else torch.stack(folded).sum(0)


@dataclass(frozen=True)
class Rider:
    """A parameter beside the projections with rows for every head, e.g. sinks; group g owns `g*rows ... (g+1)*rows`.

    path: in the block.
    """

    path: str
    parameter: nn.Parameter
    rows: int

    def rows_of(self, groups: Tensor) -> Tensor:
        """Row indices owned by `groups` ([k] int64, ascending): [k * rows] int64."""
        return (groups[:, None] * self.rows + torch.arange(self.rows)).reshape(-1)


@dataclass(frozen=True)
class OutputLinear(Projection):
    """The output projection of a block; group g owns columns `g*columns ... (g+1)*columns`."""

    columns: int

    def columns_of(self, groups: Tensor) -> Tensor:
        """Column indices owned by `groups` ([k] int64, ascending): [k * columns] int64."""
        return (groups[:, None] * self.columns + torch.arange(self.columns)).reshape(-1)

    def by_group(self, columns: Tensor) -> Tensor:
        """A view of [..., I], a number per column: [..., groups, columns of a group]."""
        return columns.view(*columns.shape[:-1], -1, self.columns)

    def fold_columns(self, columns: Tensor) -> Tensor:
        """Sum the last dimension [..., I] of `columns` into groups [..., groups], same dtype."""
        return columns if self.columns == 1 else self.by_group(columns).sum(-1)


@dataclass(frozen=True)
class Cut:
    """What remains of one parameter or buffer when groups go.

    path: of the parameter in the block. dim: the dimension that gets shorter. index: what is kept of it: [k] int64, or
    [E, k] where each entry of the first dimension keeps its own.
    """

    path: str
    dim: int
    index: Tensor


def take_columns(tensor: Tensor, columns: Tensor) -> Tensor:
    """A copy of these columns ([K] int64) of [..., I], in [..., K]; on a CPU in a third of the time of indexing."""
    return tensor.gather(-1, columns.expand(*tensor.shape[:-1], -1))


def writing(block: nn.Module, output: nn.Module) -> nn.Module:
    """`Block.module` of a block, whose output projection is given.

    A block that adds to the residual stream itself returns the sum; what it adds is what its output projection returns.
    """
    return output if adds_residual(block) else block


def added(layer: nn.Module, module: nn.Module, kind: str) -> tuple[float | None, nn.Module]:
    """`Block.adds` and `Block.writer` of a decoder layer's block, whose module is given."""
    _, after = norms_of(layer, kind)
    if after is not None:
        return None, getattr(layer, after)
    return float(getattr(layer, "residual_multiplier", 1.0)), module


@dataclass(frozen=True)
class Block(ABC):
    """One block of a decoder layer, with `groups` prunable groups.

    path: the attribute of the decoder layer from which the paths of the block's parameters start.
    module: what computes the block's output.
    cost: parameters removed with one group, biases included.
    adds: the factor with which the block's output is added to the residual stream; None where a norm stands between.
    writer: the module whose output is added: the block's own, or the norm after it.
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
        """Names the block in mappings."""
        return BlockKey(self.layer, self.kind.name)

    @property
    def sets(self) -> int:
        """The groups divide into this many consecutive parts of equal size, which must keep equally many each."""
        return 1

    @property
    def norm(self) -> nn.Module | None:
        """The norm after the block, whose output is added; None where the block's own is."""
        return None if self.writer is self.module else self.writer

    @property
    def min_kept(self) -> int:
        """Groups of each set that stay, at least, if any do."""
        return 1

    @property
    def outputs(self) -> int:
        """How many output projections it has."""
        return 1

    @property
    @abstractmethod
    def width(self) -> int:
        """Columns of the output projection (of all experts' together)."""

    @property
    def read_width(self) -> int:
        """How many numbers output projections read of a token."""
        return self.width

    @property
    @abstractmethod
    def solved_columns(self) -> int:
        """Columns of an output projection that repair solves for at once; 0 where it solves none."""

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, int]]:
        """The prunable weights: path in the block, and number of elements."""

    @abstractmethod
    def output_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What masking changes: the output projection's parameters, with their paths in the block."""

    @abstractmethod
    def mask(self, kept: Tensor) -> None:
        """Zero in place what the groups that are not kept ([groups] bool) write; the bias too if none is."""

    @contextmanager
    def masked(self, kept: Tensor) -> Iterator[None]:
        """Inside the context the block, whose weights are in memory, computes what it would if it were cut.

        kept: [groups] bool.
        """
        with values_restored(parameter for _, parameter in self.output_parameters()):
            self.mask(kept)
            yield

    @abstractmethod
    def writing_by(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Inside the context the block, whose weights are in memory, has other output projections: [O, I] each."""

    @abstractmethod
    def cuts(self, groups: Tensor) -> Iterator[Cut]:
        """What remains of the block's parameters and buffers when `groups` ([k] int64, ascending) stay."""


@dataclass(frozen=True)
class LinearBlock(Block):
    """A block of plain linear layers.

    inputs, output: its projections, whose rows and columns belong to groups.
    head_dim: width of an attention head; 1 where a group is a single channel.
    riders: parameters that are cut with the groups and are no projections.
    follows: of shared experts whose width the configuration states as a multiple of the routed experts': that multiple;
        else 0.
    parent: of shared experts, what calls them; it may put the tokens of all samples into one row.
    """

    inputs: tuple[InputLinear, ...]
    output: OutputLinear
    head_dim: int
    riders: tuple[Rider, ...]
    follows: int = 0
    parent: nn.Module | None = None

    @property
    def heads_per_group(self) -> int:
        """Query heads of one KV head; 1 in an MLP."""
        return self.output.columns // self.head_dim

    @property
    def projections(self) -> "tuple[InputLinear | OutputLinear, ...]":
        """Every prunable linear layer of the block, the output last."""
        return (*self.inputs, self.output)

    @property
    def width(self) -> int:
        """Columns of the output projection."""
        return self.output.weight.shape[1]

    @property
    def solved_columns(self) -> int:
        """Columns of the output projection."""
        return self.width

    def weights(self) -> Iterator[tuple[str, int]]:
        """The projections' weights."""
        for entry in self.projections:
            yield entry.path, entry.linear.weight.numel()

    def output_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The output projection's weight and bias."""
        for name, parameter in self.output.linear.named_parameters():
            yield f"{self.output.path}.{name}", parameter

    @torch.no_grad()
    def mask(self, kept: Tensor) -> None:
        """Zero the columns of the groups that are not kept, and the bias if none is: cutting drops the block."""
        linear, weight = self.output.linear, self.output.weight
        weight[:, self.output.columns_of((~kept).nonzero().flatten()).to(weight.device)] = 0.0
        if linear.bias is not None and not kept.any():
            linear.bias.zero_()

    def writing_by(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Of the one output projection."""
        (weight,) = weights
        stored = weight.T if self.output.transposed else weight
        return value_replaced(self.output.linear.get_parameter("weight"), stored)

    def cuts(self, groups: Tensor) -> Iterator[Cut]:
        """Rows of the input projections and of the riders, columns of the output projection."""
        for entry in self.inputs:
            yield from entry.cut(entry.rows_of(groups), None)
        for rider in self.riders:
            yield Cut(rider.path, 0, rider.rows_of(groups))
        yield from self.output.cut(None, self.output.columns_of(groups))


@dataclass(frozen=True)
class PrunableModel:
    """A model and its prunable blocks. Cutting or replacing a block makes it stale: `describe` the model again.

    blocks: the existing ones in the order in which they add to the residual stream; blocks that an earlier pruning
        removed are not among them.
    dropped: those that an earlier pruning removed.
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    blocks: tuple[Block, ...]
    dropped: frozenset[BlockKey]

    def of_layer(self, layer: int) -> tuple[Block, ...]:
        """The existing blocks of one decoder layer, in order."""
        return tuple(block for block in self.blocks if block.layer == layer)

    def of_kind(self, kind: str) -> list[LinearBlock | None]:
        """Per decoder layer, its block of linear layers of the kind of that name; None where it does not exist."""
        found = {block.layer: block for block in self.linear_blocks if block.kind.name == kind}
        return [found.get(layer) for layer in range(len(self.layers))]

    @property
    def linear_blocks(self) -> tuple[LinearBlock, ...]:
        """The blocks of plain linear layers."""
        return tuple(block for block in self.blocks if isinstance(block, LinearBlock))

    @property
    def has_experts(self) -> bool:
        """Whether groups of experts are among those that can be pruned."""
        return len(self.linear_blocks) < len(self.blocks)

    def with_groups(self) -> "PrunableModel":
        """This model, which has something left to prune.

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
        """Parameters of all groups."""
        return sum(block.groups * block.cost for block in self.blocks)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Where the model is; where it is spread over several devices, its embedding."""
        return self.model.device

    @cached_property
    def spread(self) -> bool:
        """Whether the weights are on several devices."""
        return self.residency is None and len({parameter.device for parameter in self.model.parameters()}) > 1

    def device_of(self, layer: int) -> torch.device:
        """Where a decoder layer runs."""
        return next(self.layers[layer].parameters()).device if self.spread else self.device

    @property
    def residency(self) -> Residency | None:
        """How the layers of a streamed model come and go; None for a model that is whole in memory."""
        return residency_of(self.model)

    def resident(self, layer: int, then: int | None = None) -> AbstractContextManager[None]:
        """Inside the context the weights of a decoder layer are in memory; see `Residency.resident`."""
        return nullcontext() if self.residency is None else self.residency.resident(layer, then)

    @contextmanager
    def rewriting(self, block: Block, paths: Sequence[str]) -> Iterator[None]:
        """Inside the context parameters of a block, named by their paths in it, can be changed in place, for good.

        They get memory of their own, so that a model that shares it stays as it is.
        """
        with self.resident(block.layer, block.layer + 1):
            for path in paths:
                parameter = self.layers[block.layer].get_parameter(f"{block.path}.{path}")
                parameter.data = parameter.detach().clone()
            yield
            if self.residency is not None:
                for path in paths:
                    self.residency.replace(block.layer, f"{block.path}.{path}")
