"""Mixtures of experts: the routed experts of a decoder layer as a block, and how they are run expert by expert.

transformers keeps the weights of a layer's experts in three-dimensional parameters of one module, whose forward takes
the tokens with their routing. All experts of a module have the same width, so each keeps the same number of channels.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models.blocks import Block, Cut, added
from gradprune.models.kinds import Kind
from gradprune.models.modes import forward_replaced

NO_EXPERTS = "no experts under a known name"
_PLACES = ("mlp", "feed_forward", "block_sparse_moe", "moe")

Product = Callable[[Tensor, str, int, Tensor, Tensor, Tensor | None], Tensor]
"""Computes x W^T + b for an expert. Its arguments: numbers of the expert's tokens [S] int64, ascending; name of the
parameter; number of the expert; x [S, I]; W [O, I]; b [O] or None."""


@dataclass(frozen=True)
class ExpertProjection:
    """The weights of one projection of all experts.

    name: of the parameter in the experts' module; bias: [E, O]. transposed: an expert's weight is stored [I, O].
    """

    name: str
    parameter: nn.Parameter
    bias: nn.Parameter | None
    transposed: bool

    def weight(self, expert: int) -> Tensor:
        """[O, I], a view."""
        own = self.parameter[expert]
        return own.T if self.transposed else own

    def bias_of(self, expert: int) -> Tensor | None:
        """[O], a view, or None."""
        return None if self.bias is None else self.bias[expert]

    @property
    def rows(self) -> int:
        """The dimension of the parameter that an expert's outputs lie along."""
        return 2 if self.transposed else 1

    @property
    def columns(self) -> int:
        """The dimension of the parameter that an expert's inputs lie along."""
        return 1 if self.transposed else 2


@dataclass(frozen=True)
class ExpertsBlock(Block):
    """The routed experts of a layer; group e * channels + i is channel i of expert e.

    gate_up: the input projections, rows of gate and up stacked or alternating; parts: 2, or 1 without a gate.
    down: the output projection. parent: the module that routes the tokens, and calls `module`.
    """

    gate_up: ExpertProjection
    down: ExpertProjection
    parts: int
    interleaved: bool
    parent: nn.Module

    @property
    def experts(self) -> int:
        """Routed experts of the layer."""
        return len(self.down.parameter)

    @property
    def channels(self) -> int:
        """Channels of each expert."""
        return self.down.parameter.shape[self.down.columns]

    @property
    def projections(self) -> tuple[ExpertProjection, ExpertProjection]:
        """The input projections, and the output projection."""
        return self.gate_up, self.down

    @property
    def sets(self) -> int:
        """One for each expert."""
        return self.experts

    @property
    def width(self) -> int:
        """Channels of all experts together."""
        return self.experts * self.channels

    @property
    def solved_columns(self) -> int:
        """None: an expert sees too few tokens."""
        return 0

    def groups_of(self, expert: int) -> slice:
        """Which groups are the expert's."""
        return slice(expert * self.channels, (expert + 1) * self.channels)

    def fold_rows(self, rows: Tensor) -> Tensor:
        """Sum a vector over an expert's rows of the input projections [parts * channels] into one over channels."""
        parts = rows.view(-1, self.parts).T if self.interleaved else rows.view(self.parts, -1)
        return parts.sum(0)

    def rows_of(self, channels: Tensor) -> Tensor:
        """Rows of the input projections that belong to `channels` ([E, k] int64): [E, parts * k] int64."""
        if self.interleaved:
            return (channels[..., None] * self.parts + torch.arange(self.parts)).flatten(1)
        return torch.cat([channels + part * self.channels for part in range(self.parts)], 1)

    def weights(self) -> Iterator[tuple[str, int]]:
        """The two three-dimensional parameters."""
        for projection in self.projections:
            yield projection.name, projection.parameter.numel()

    def output_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The output projection's weights."""
        yield self.down.name, self.down.parameter

    @torch.no_grad()
    def mask(self, kept: Tensor) -> None:
        """Zero the output columns of the channels that are not kept."""
        gone = (~kept).view(self.experts, self.channels).to(self.down.parameter.device)
        along = gone[:, :, None] if self.down.transposed else gone[:, None, :]
        self.down.parameter.masked_fill_(along, 0.0)

    def cuts(self, groups: Tensor) -> Iterator[Cut]:
        """Rows of the input projections with their biases, and columns of the output projection, of each expert.

        Raises:
            ValueError: the experts do not keep equally many channels each.
        """
        kept = torch.bincount(groups // self.channels, minlength=self.experts)
        if int(kept.min()) != int(kept.max()) or not len(groups):
            raise ValueError(
                f"masks: the experts of layer {self.layer} keep {int(kept.min())} to {int(kept.max())} channels; each "
                "has to keep the same number, and at least one"
            )
        channels = groups.view(self.experts, -1) % self.channels
        rows = self.rows_of(channels)
        yield Cut(self.gate_up.name, self.gate_up.rows, rows)
        if self.gate_up.bias is not None:
            yield Cut(f"{self.gate_up.name}_bias", 1, rows)
        yield Cut(self.down.name, self.down.columns, channels)

    def run_by(self, product: Product) -> AbstractContextManager[None]:
        """Inside the context the experts' module computes expert by expert, as `run` does."""
        return forward_replaced(self.module, partial(self.run, product))

    def run(self, product: Product, hidden: Tensor, chosen: Tensor, routing: Tensor) -> Tensor:
        """What the experts' module computes, expert by expert: [S, H], differentiable.

        Args:
            product: computes every product with an expert's weight.
            hidden: [S, H], the tokens.
            chosen: [S, K] int64, the experts of each token.
            routing: [S, K], their factors.
        """
        module: Any = self.module
        total = torch.zeros_like(hidden)
        for expert in range(self.experts):
            tokens, slots = (chosen == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            x = hidden[tokens]
            rows = self._by(product, tokens, self.gate_up, expert, x)
            z = module._apply_gate(rows) if self.parts == 2 else module.act_fn(rows)
            y = self._by(product, tokens, self.down, expert, z)
            total = total.index_add(0, tokens, (y * routing[tokens, slots, None]).to(total.dtype))
        return total

    @staticmethod
    def _by(product: Product, tokens: Tensor, projection: ExpertProjection, expert: int, x: Tensor) -> Tensor:
        return product(tokens, projection.name, expert, x, projection.weight(expert), projection.bias_of(expert))


def plain_product(_tokens: Tensor, _name: str, _expert: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of an expert's projection, as it is."""
    return F.linear(x, weight, bias)


def find_experts(layer: nn.Module, index: int, kind: Kind) -> ExpertsBlock | str:
    """The routed experts of a decoder layer, or why there are none that can be pruned, for messages.

    Raises:
        UnsupportedArchitectureError: their weights are not floating-point parameters.
    """
    found = _experts_in(layer)
    if found is None:
        return NO_EXPERTS
    path, parent, module = found
    if getattr(module, "has_post_expert_norm", True):
        return f"{path} is of a form that is not known"
    parts = 2 if module.has_gate else 1
    gate_up = _projection(module, "gate_up_proj" if parts == 2 else "up_proj", index)
    down = _projection(module, "down_proj", index)
    if gate_up is None or down is None:
        return f"{path} has no known set of projections"
    experts, outputs, channels = len(down.parameter), *down.weight(0).shape
    if gate_up.parameter.shape[gate_up.rows] != parts * channels or len(gate_up.parameter) != experts:
        return f"{path}: its projections do not fit together"
    adds, writer = added(layer, module, "mlp")
    cost = parts * (gate_up.weight(0).shape[1] + (gate_up.bias is not None)) + outputs
    return ExpertsBlock(
        kind=kind,
        layer=index,
        path=path,
        module=module,
        groups=experts * channels,
        cost=cost,
        adds=adds,
        writer=writer,
        gate_up=gate_up,
        down=down,
        parts=parts,
        interleaved=not module.is_concatenated,
        parent=parent,
    )


def has_experts(layer: nn.Module) -> bool:
    """Whether a decoder layer has experts."""
    return _experts_in(layer) is not None


def _experts_in(layer: nn.Module) -> tuple[str, nn.Module, Any] | None:
    """Path of the experts' module in a decoder layer, the module that calls it, and it."""
    for place in _PLACES:
        parent = getattr(layer, place, None)
        module = getattr(parent, "experts", None)
        if isinstance(parent, nn.Module) and isinstance(module, nn.Module):
            return f"{place}.experts", parent, module
    return None


def _projection(module: nn.Module, name: str, layer: int) -> ExpertProjection | None:
    """The projection of that name; None where there is none."""
    parameter, bias = (getattr(module, each, None) for each in (name, f"{name}_bias"))
    if not isinstance(parameter, nn.Parameter) or parameter.ndim != 3:
        return None
    if not parameter.is_floating_point():
        raise UnsupportedArchitectureError(
            f"base_model: layer {layer}'s experts are of {parameter.dtype}; gradprune prunes floating-point weights "
            "(load the model unquantised)"
        )
    transposed = bool(getattr(module, "is_transposed", False))
    return ExpertProjection(name, parameter, bias if isinstance(bias, nn.Parameter) else None, transposed)
