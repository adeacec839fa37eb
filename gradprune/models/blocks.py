"""Views of a loaded model's prunable blocks: which rows and columns of which weights form each group."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models.architecture import ARCHITECTURES, Architecture, InputProjection

Kind = Literal["attention", "mlp"]


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
        """Row indices owned by `groups` ([k] int64, ascending), part by part: [k * sum(part.rows)] int64."""
        spans = [
            (part.offset + groups[:, None] * part.rows + torch.arange(part.rows)).reshape(-1) for part in self.parts
        ]
        return torch.cat(spans)

    def fold_rows(self, rows: Tensor, groups: int) -> Tensor:
        """Sum a vector over rows [O] into one over groups [groups], same dtype."""
        folded = [rows[p.offset : p.offset + groups * p.rows].view(groups, p.rows).sum(1) for p in self.parts]
        return torch.stack(folded).sum(0)


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
    """One attention or MLP block of a decoder layer, with `groups` prunable groups.

    cost: parameters removed with one group, biases included.
    head_dim: width of an attention head; 1 in an MLP.
    """

    kind: Kind
    layer: int
    module: nn.Module
    inputs: tuple[InputLinear, ...]
    output: OutputLinear
    groups: int
    cost: int
    head_dim: int

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
    """The prunable view of a model: its architecture, decoder layers, and per layer its blocks.

    A block that an earlier pruning removed is None.
    """

    architecture: Architecture
    layers: nn.ModuleList
    attention: list[Block | None]
    mlp: list[Block | None]

    def blocks(self) -> Iterator[Block]:
        """All existing blocks in the order the data passes them: attention 0, mlp 0, attention 1, ..."""
        for pair in zip(self.attention, self.mlp, strict=True):
            yield from (block for block in pair if block is not None)


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
    return PrunableModel(
        architecture,
        layers,
        [_attention_block(architecture, layer, index) for index, layer in enumerate(layers)],
        [_mlp_block(architecture, layer, index) for index, layer in enumerate(layers)],
    )


def _attention_block(architecture: Architecture, layer: nn.Module, index: int) -> Block | None:
    module = layer.get_submodule(architecture.attention)
    if not hasattr(module, architecture.attention_output):
        return None
    output = _linear(module, architecture.attention_output, index)
    linears = [_linear(module, projection.path, index) for projection in architecture.attention_inputs]
    head_dim = int(getattr(module, "head_dim"))  # noqa: B009 - nn.Module's __getattr__ is typed Tensor | Module
    heads = output.in_features // head_dim
    kv_heads = (sum(linear.out_features for linear in linears) // head_dim - heads) // 2
    rows = {"q": heads // kv_heads * head_dim, "k": head_dim, "v": head_dim}
    return _block(
        "attention",
        index,
        module,
        architecture.attention_inputs,
        linears,
        rows,
        architecture.attention_output,
        kv_heads,
    )


def _mlp_block(architecture: Architecture, layer: nn.Module, index: int) -> Block | None:
    module = layer.get_submodule(architecture.mlp)
    if not hasattr(module, architecture.mlp_output):
        return None
    output = _linear(module, architecture.mlp_output, index)
    linears = [_linear(module, projection.path, index) for projection in architecture.mlp_inputs]
    rows = {"gate": 1, "up": 1}
    return _block(
        "mlp", index, module, architecture.mlp_inputs, linears, rows, architecture.mlp_output, output.in_features
    )


def _block(
    kind: Kind,
    layer: int,
    module: nn.Module,
    projections: tuple[InputProjection, ...],
    linears: list[nn.Linear],
    rows: dict[str, int],
    output_path: str,
    groups: int,
) -> Block:
    output = _linear(module, output_path, layer)
    inputs = []
    cost = output.weight.shape[0] * (output.in_features // groups)
    for projection, linear in zip(projections, linears, strict=True):
        parts, offset = [], 0
        for name in projection.parts:
            parts.append(Part(offset, rows[name]))
            offset += rows[name] * groups
        inputs.append(InputLinear(projection.path, linear, tuple(parts)))
        cost += sum(part.rows for part in parts) * (linear.in_features + (linear.bias is not None))
    output_linear = OutputLinear(output_path, output, output.in_features // groups)
    return Block(kind, layer, module, tuple(inputs), output_linear, groups, cost, rows.get("k", 1))


def _linear(module: nn.Module, path: str, layer: int) -> nn.Linear:
    linear = module.get_submodule(path)
    if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
        raise UnsupportedArchitectureError(
            f"base_model: layer {layer}'s {path} is a {type(linear).__name__} of {linear.weight.dtype}; "
            "gradprune prunes plain floating-point nn.Linear layers (load the model unquantised, merge adapters)"
        )
    return linear


KINDS: tuple[Kind, Kind] = ("attention", "mlp")
