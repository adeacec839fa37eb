"""The prunable blocks of a loaded model: which rows and columns of which weights form each group."""

from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models.kinds import BlockKey, Kind
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
class InputLinear:
    """An input projection of a block: its attribute path in the block, its module and its parts."""

    path: str
    linear: nn.Linear
    parts: tuple[Part, ...]

    def rows_of(self, groups: Tensor) -> Tensor:
        """Row indices owned by `groups` ([k] int64, ascending), part by part: [k * sum of part.rows] int64."""
        spans = [
            (part.offset + groups[:, None] * part.rows + torch.arange(part.rows)).reshape(-1) for part in self.parts
        ]
        return torch.cat(spans)

    def fold_rows(self, rows: Tensor, groups: int) -> Tensor:
        """Sum a vector over rows [O] into one over groups [groups], same dtype."""
        folded = [rows[p.offset : p.offset + groups * p.rows].view(groups, p.rows).sum(1) for p in self.parts]
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
class OutputLinear:
    """The output projection of a block; group g owns columns `g*columns ... (g+1)*columns`."""

    path: str
    linear: nn.Linear
    columns: int

    def columns_of(self, groups: Tensor) -> Tensor:
        """Column indices owned by `groups` ([k] int64, ascending): [k * columns] int64."""
        return (groups[:, None] * self.columns + torch.arange(self.columns)).reshape(-1)

    def fold_columns(self, columns: Tensor) -> Tensor:
        """Sum the last dimension [..., I] of `columns` into groups [..., groups], same dtype."""
        return columns.view(*columns.shape[:-1], -1, self.columns).sum(-1)


@dataclass(frozen=True)
class Block:
    """One block of a decoder layer, with `groups` prunable groups.

    path: the block's attribute in the decoder layer; module: what is there.
    inputs, output: its projections, whose rows and columns belong to groups.
    cost: parameters removed with one group, biases included.
    head_dim: width of an attention head; 1 where a group is a single channel.
    riders: parameters that are cut with the groups and are no projections.
    adds: the factor with which the block's output is added to the residual stream; None where a norm stands between.
    writer: the module whose output is added: the block's own, or the norm behind it.
    """

    kind: Kind
    layer: int
    path: str
    module: nn.Module
    inputs: tuple[InputLinear, ...]
    output: OutputLinear
    groups: int
    cost: int
    head_dim: int
    riders: tuple[Rider, ...]
    adds: float | None
    writer: nn.Module

    @property
    def key(self) -> BlockKey:
        """Names the block in mappings."""
        return BlockKey(self.layer, self.kind.name)

    @property
    def heads_per_group(self) -> int:
        """Query heads of one KV head; 1 in an MLP."""
        return self.output.columns // self.head_dim

    @property
    def projections(self) -> "tuple[InputLinear | OutputLinear, ...]":
        """Every prunable linear layer of the block, the output last."""
        return (*self.inputs, self.output)


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

    def of_kind(self, kind: str) -> list[Block | None]:
        """Per decoder layer, its block of the kind of that name; None where it does not exist."""
        found = {block.layer: block for block in self.blocks if block.kind.name == kind}
        return [found.get(layer) for layer in range(len(self.layers))]

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

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def residency(self) -> Residency | None:
        """How the layers of a streamed model come and go; None for a model that is whole in memory."""
        return residency_of(self.model)

    def resident(self, layer: int, then: int | None = None) -> AbstractContextManager[None]:
        """Inside the context the weights of a decoder layer are in memory; see `Residency.resident`."""
        return nullcontext() if self.residency is None else self.residency.resident(layer, then)

    @contextmanager
    def rewriting(self, block: Block) -> Iterator[None]:
        """Inside the context the parameters of a block's output projection can be changed in place, for good."""
        with self.resident(block.layer, block.layer + 1):
            yield
            if self.residency is not None:
                for name, _ in block.output.linear.named_parameters():
                    self.residency.replace(block.layer, f"{block.path}.{block.output.path}.{name}")

    def shelf(self) -> MutableMapping[nn.Linear, Tensor]:
        """An empty mapping for weights of the model's output projections: in files where the model is streamed."""
        return {} if self.residency is None else self.residency.shelf()
