"""The prunable blocks of a loaded model: which rows and columns of which weights form each group."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models.architecture import ARCHITECTURES, Architecture, BlockLayout
from gradprune.models.kinds import KINDS, BlockKey, Kind


@dataclass(frozen=True)
class Part:
    """Consecutive rows of an input projection: group g owns rows `offset + g*rows ... offset + (g+1)*rows`."""

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
    """

    model: PreTrainedModel
    architecture: Architecture
    layers: nn.ModuleList
    blocks: tuple[Block, ...]

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


def supported_architectures() -> str:
    """The supported `model_type`s, for messages."""
    return ", ".join(sorted(ARCHITECTURES))


def describe(model: PreTrainedModel) -> PrunableModel:
    """Find the prunable blocks of `model`.

    Raises:
        UnsupportedArchitectureError: the architecture is not described, or a projection is not a plain
            floating-point `nn.Linear` (quantised weights, adapters).
    """
    model_type = getattr(model.config, "model_type", type(model).__name__)
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise UnsupportedArchitectureError(
            f"base_model: architecture '{model_type}' is not supported; supported are {supported_architectures()}"
        )
    layers = model.get_submodule(architecture.layers)
    assert isinstance(layers, nn.ModuleList)
    return PrunableModel(model, architecture, layers, tuple(_blocks(architecture, layers)))


def _blocks(architecture: Architecture, layers: nn.ModuleList) -> Iterator[Block]:
    for index, layer in enumerate(layers):
        for layout in architecture.blocks:
            module = layer.get_submodule(layout.module)
            # The module that replaces a removed block has no projections.
            if hasattr(module, layout.output):
                yield _block(layout, module, index)


def _block(layout: BlockLayout, module: nn.Module, layer: int) -> Block:
    output = _linear(module, layout.output, layer)
    linears = [_linear(module, projection.path, layer) for projection in layout.inputs]
    shape = _GROUP_SHAPES[layout.kind](module, linears, output)
    columns = output.in_features // shape.groups
    inputs = []
    cost = output.out_features * columns
    for projection, linear in zip(layout.inputs, linears, strict=True):
        parts, offset = [], 0
        for name in projection.parts:
            parts.append(Part(offset, shape.rows[name]))
            offset += shape.rows[name] * shape.groups
        inputs.append(InputLinear(projection.path, linear, tuple(parts)))
        cost += sum(part.rows for part in parts) * (linear.in_features + (linear.bias is not None))
    return Block(
        _KINDS[layout.kind],
        layer,
        layout.module,
        module,
        tuple(inputs),
        OutputLinear(layout.output, output, columns),
        shape.groups,
        cost,
        shape.head_dim,
    )


@dataclass(frozen=True)
class _GroupShape:
    """groups: of the block. rows: of one group, by part of the input projections. head_dim: as in `Block`."""

    groups: int
    rows: dict[str, int]
    head_dim: int


def _kv_groups(module: nn.Module, inputs: list[nn.Linear], output: nn.Linear) -> _GroupShape:
    """A group is a KV head with its query heads."""
    head_dim = int(getattr(module, "head_dim"))  # noqa: B009 - nn.Module's __getattr__ is typed Tensor | Module
    heads = output.in_features // head_dim
    kv_heads = (sum(linear.out_features for linear in inputs) // head_dim - heads) // 2
    return _GroupShape(kv_heads, {"q": heads // kv_heads * head_dim, "k": head_dim, "v": head_dim}, head_dim)


def _channels(_module: nn.Module, _inputs: list[nn.Linear], output: nn.Linear) -> _GroupShape:
    """A group is one intermediate channel."""
    return _GroupShape(output.in_features, {"gate": 1, "up": 1}, 1)


_KINDS: dict[str, Kind] = {kind.name: kind for kind in KINDS}
_GROUP_SHAPES: dict[str, Callable[[nn.Module, list[nn.Linear], nn.Linear], _GroupShape]] = {
    "attention": _kv_groups,
    "mlp": _channels,
}


def _linear(module: nn.Module, path: str, layer: int) -> nn.Linear:
    linear = module.get_submodule(path)
    if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
        raise UnsupportedArchitectureError(
            f"base_model: layer {layer}'s {path} is a {type(linear).__name__} of {linear.weight.dtype}; "
            "gradprune prunes plain floating-point nn.Linear layers (load the model unquantised, merge adapters)"
        )
    return linear
