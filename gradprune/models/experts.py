"""Mixtures of experts: the routed experts of a decoder layer as a block, and how they are run all together.

transformers keeps the weights of a layer's experts in three-dimensional parameters of one module, whose forward takes
the tokens with their routing. All experts of a module have the same width, so each keeps the same number of channels;
or an expert goes as a whole, with its row of the router.
"""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models.blocks import Block, Cut, LinearBlock, added
from gradprune.models.inspection import block_at
from gradprune.models.kinds import Kind
from gradprune.models.loss import times
from gradprune.models.modeling_gradprune import SHARED_WIDTHS, name_in
from gradprune.models.modes import forward_replaced, value_replaced, values_restored
from gradprune.models.router import Router, experts_of_token, find_router, named_tensors

NO_EXPERTS = "no experts under a known name"
_PLACES = ("mlp", "feed_forward", "block_sparse_moe", "moe")
_SHARED = ("shared_experts", "shared_expert", "shared_mlp")


@dataclass(frozen=True)
class Routed:
    """Which tokens go to which experts: a row for each token and expert of its own, expert by expert.

    places: [R] int64, each row's place in [S, K], flat: token by token, the K experts that each is sent to. Of an
        expert they ascend.
    chosen: K.
    gates: [R], what the expert's output is multiplied by.
    counts: by expert, its number of rows.
    """

    places: Tensor
    chosen: int
    gates: Tensor
    counts: tuple[int, ...]

    @cached_property
    def tokens(self) -> Tensor:
        """[R] int64, the number of each row's token."""
        return self.places // self.chosen

    @cached_property
    def spans(self) -> tuple[slice, ...]:
        """By expert, which rows are its own."""
        ends = itertools.accumulate(self.counts, initial=0)
        return tuple(slice(start, end) for start, end in itertools.pairwise(ends))

    @cached_property
    def row_at(self) -> Tensor:
        """[R] int64, the row of each place, where every place has one."""
        return torch.empty_like(self.places).index_copy_(
            0, self.places, torch.arange(len(self.places), device=self.places.device)
        )

    def to(self, device: torch.device) -> "Routed":
        """The same on a device."""
        return replace(self, places=self.places.to(device), gates=self.gates.to(device))

    def by_expert(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The experts that see tokens, each with its part of `rows` [R, ...]."""
        for expert, part in enumerate(rows.split(self.counts)):
            if len(part):
                yield expert, part


ExpertProduct = Callable[["Routed", "ExpertProjection", Tensor], Tensor]
"""Computes a projection of all experts: [R, O] of its inputs, x: [R, I]."""


@dataclass(frozen=True)
class ExpertProjection:
    """The weights of one projection of all experts.

    module: of the experts, whose parameters are other objects each time that a streamed layer is read.
    own: the parameter's name in it. transposed: an expert's weight is stored [I, O].
    """

    module: nn.Module
    own: str
    transposed: bool

    @property
    def name(self) -> str:
        """Path of the parameter in the block."""
        return f"experts.{self.own}"

    @property
    def parameter(self) -> nn.Parameter:
        """[E, O, I] as stored, or [E, I, O]."""
        return self.module.get_parameter(self.own)

    @property
    def bias(self) -> nn.Parameter | None:
        """[E, O], or None."""
        found = getattr(self.module, f"{self.own}_bias", None)
        return found if isinstance(found, nn.Parameter) else None

    def weight(self, expert: int) -> Tensor:
        """[O, I], a view."""
        own = self.parameter[expert]
        return own.T if self.transposed else own

    def bias_of(self, expert: int) -> Tensor | None:
        """[O], a view, or None."""
        bias = self.bias
        return None if bias is None else bias[expert]

    def product(self, routed: Routed, x: Tensor) -> Tensor:
        """[R, O]: x W^T + b of x [R, I], each row with its expert's weights."""
        return torch.cat(
            [F.linear(part, self.weight(expert), self.bias_of(expert)) for expert, part in routed.by_expert(x)]
        )

    def transposed_product(self, routed: Routed, dy: Tensor) -> Tensor:
        """[R, I]: dy W of dy [R, O], each row with its expert's weights."""
        return torch.cat([times(part, self.weight(expert).to(dy.dtype)) for expert, part in routed.by_expert(dy)])

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
    """The routed experts of a layer.

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
    def outputs(self) -> int:
        """One for each expert."""
        return self.experts

    @property
    def width(self) -> int:
        """Channels of all experts together."""
        return self.experts * self.channels

    @property
    def read_width(self) -> int:
        """Channels of the experts that a token sees."""
        return self.channels * (experts_of_token(self.module.config) or self.experts)

    @property
    def solved_columns(self) -> int:
        """None that a warning is due for: an expert that sees too few tokens is left as it is."""
        return 0

    def channels_of(self, expert: int) -> slice:
        """Which of the channels of all experts are the expert's."""
        return slice(expert * self.channels, (expert + 1) * self.channels)

    @abstractmethod
    def groups_of(self, expert: int) -> slice:
        """Which groups are the expert's."""

    def kept_channels(self, expert: int, kept: Tensor) -> Tensor:
        """[K] int64, the channels that an expert keeps; kept: [groups] bool."""
        return kept[self.groups_of(expert)].expand(self.channels).nonzero().flatten()

    def reroutes(self, _kept: Tensor) -> bool:
        """Whether tokens see other experts when only the groups `kept` ([groups] bool) are there."""
        return False

    @abstractmethod
    def fold_channels(self, channels: Tensor) -> Tensor:
        """Sum the last dimension [..., channels], an expert's channels, into its groups."""

    def fold_rows(self, rows: Tensor) -> Tensor:
        """Sum the last dimension [..., parts * channels], an expert's rows of the input projections, into channels."""
        leading = rows.shape[:-1]
        if self.interleaved:
            return rows.reshape(*leading, -1, self.parts).sum(-1)
        return rows.reshape(*leading, self.parts, -1).sum(-2)

    def weights(self) -> Iterator[tuple[str, int]]:
        """The two three-dimensional parameters."""
        for projection in self.projections:
            yield projection.name, projection.parameter.numel()

    def output_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The output projection's weights."""
        yield self.down.name, self.down.parameter

    def writing_by(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Of every expert's output projection."""
        stacked = torch.stack(list(weights))
        return value_replaced(self.down.parameter, stacked.mT if self.down.transposed else stacked)

    def run_by(self, product: ExpertProduct) -> AbstractContextManager[None]:
        """Inside the context the experts' module computes as `run` does."""
        return forward_replaced(self.module, partial(self.run, product))

    def run(self, product: ExpertProduct, hidden: Tensor, chosen: Tensor, routing: Tensor) -> Tensor:
        """What the experts' module computes: [S, H], differentiable.

        Args:
            product: computes the two projections.
            hidden: [S, H], the tokens.
            chosen: [S, K] int64, the experts of each token.
            routing: [S, K], their factors.
        """
        module: Any = self.module
        routed = _routed(chosen, routing, self.experts)
        of_tokens: Tensor = _RowsOfTokens.apply(hidden, routed)  # type: ignore[no-untyped-call]
        rows = product(routed, self.gate_up, of_tokens)
        z = module._apply_gate(rows) if self.parts == 2 else module.act_fn(rows)
        y = product(routed, self.down, z) * routed.gates[:, None]
        return _sums_by_token(y.to(hidden.dtype), routed, len(hidden))


@dataclass(frozen=True)
class ExpertChannels(ExpertsBlock):
    """The channels of a layer's experts: group e * channels + i is channel i of expert e."""

    @property
    def sets(self) -> int:
        """One for each expert."""
        return self.experts

    def groups_of(self, expert: int) -> slice:
        """Its channels."""
        return self.channels_of(expert)

    def fold_channels(self, channels: Tensor) -> Tensor:
        """A group is a channel."""
        return channels

    def rows_of(self, channels: Tensor) -> Tensor:
        """Rows of the input projections that belong to `channels` ([E, k] int64): [E, parts * k] int64."""
        if self.interleaved:
            return (channels[..., None] * self.parts + torch.arange(self.parts)).flatten(1)
        return torch.cat([channels + part * self.channels for part in range(self.parts)], 1)

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


@dataclass(frozen=True)
class WholeExperts(ExpertsBlock):
    """A layer's experts as wholes: group e is expert e with its row of the router, and what else is its own there."""

    router: Router

    @property
    def sets(self) -> int:
        """The groups that the router divides its experts into."""
        return self.router.sets

    @property
    def min_kept(self) -> int:
        """Of each set, so many that every token still gets as many experts as before."""
        return self.router.min_kept

    def groups_of(self, expert: int) -> slice:
        """Itself."""
        return slice(expert, expert + 1)

    def reroutes(self, kept: Tensor) -> bool:
        """Where an expert goes."""
        return not bool(kept.all())

    def fold_channels(self, channels: Tensor) -> Tensor:
        """All channels are one group's."""
        return channels.sum(-1, keepdim=True)

    def weights(self) -> Iterator[tuple[str, int]]:
        """The two three-dimensional parameters, and the router's."""
        yield from super().weights()
        yield self.router.path, self.router.weight.numel()

    def output_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The output projection's weights and biases."""
        yield from super().output_parameters()
        if self.down.bias is not None:
            yield f"{self.down.name}_bias", self.down.bias

    @torch.no_grad()
    def mask(self, kept: Tensor) -> None:
        """Zero what the experts that go write. Tokens are still sent to them; `masked` sends them elsewhere."""
        gone = ~kept.to(self.down.parameter.device)
        for _, parameter in self.output_parameters():
            parameter[gone] = 0.0

    @contextmanager
    def masked(self, kept: Tensor) -> Iterator[None]:
        """Inside the context no token is sent to the experts that are not kept: their logits are -inf."""

        def logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            found = F.linear(x, weight, bias)
            return found.masked_fill(~kept.to(found.device), -torch.inf)

        with values_restored(self.router.corrections), self.router.logits_by(logits):
            with torch.no_grad():
                for correction in self.router.corrections:
                    correction.masked_fill_(~kept.to(correction.device), -torch.inf)
            yield

    def cuts(self, groups: Tensor) -> Iterator[Cut]:
        """Entries of everything that the experts and the router have by expert.

        Raises:
            ValueError: too few experts stay, or the router's sets do not keep equally many each.
        """
        size = self.groups // self.sets
        kept = torch.bincount(groups // size, minlength=self.sets)
        if int(kept.min()) != int(kept.max()) or int(kept.min()) < self.min_kept:
            within = "" if self.sets == 1 else f" of each of the router's {self.sets} sets"
            raise ValueError(
                f"masks: layer {self.layer} keeps {int(kept.min())} to {int(kept.max())} experts{within}; the same "
                f"number has to stay everywhere, and at least {self.min_kept}"
            )
        for name, tensor in named_tensors(self.module):
            if tensor.ndim and tensor.shape[0] == self.experts:
                yield Cut(f"experts.{name}", 0, groups)
        for name, dim in self.router.by_expert:
            yield Cut(name, dim, groups)


def plain_product(routed: Routed, projection: ExpertProjection, x: Tensor) -> Tensor:
    """The product of an expert's projection, as it is."""
    return projection.product(routed, x)


def find_experts(layer: nn.Module, index: int, kind: Kind) -> ExpertsBlock | str:
    """The routed experts of a decoder layer, or why there are none that can be pruned, for messages.

    Raises:
        UnsupportedArchitectureError: their weights are not floating-point parameters.
    """
    found = _experts_in(layer)
    if found is None:
        return NO_EXPERTS
    place, parent, module = found
    # transformers before 5.20 has no norm after experts, and does not say so.
    if not hasattr(module, "is_concatenated") or getattr(module, "has_post_expert_norm", False):
        return f"{place}.experts is of a form that is not known"
    parts = 2 if module.has_gate else 1
    gate_up = _projection(module, "gate_up_proj" if parts == 2 else "up_proj", index)
    down = _projection(module, "down_proj", index)
    if gate_up is None or down is None:
        return f"{place}.experts has no known set of projections"
    experts, outputs, channels = len(down.parameter), *down.weight(0).shape
    if gate_up.parameter.shape[gate_up.rows] != parts * channels or len(gate_up.parameter) != experts:
        return f"{place}.experts: its projections do not fit together"
    adds, writer = added(layer, module, "mlp")
    shared: dict[str, Any] = {
        "kind": kind, "layer": index, "path": place, "module": module, "adds": adds, "writer": writer,
        "gate_up": gate_up, "down": down, "parts": parts, "interleaved": not module.is_concatenated, "parent": parent,
    }  # fmt: skip
    if kind.name == "expert_channels":
        cost = parts * (gate_up.weight(0).shape[1] + (gate_up.bias is not None)) + outputs
        return ExpertChannels(**shared, groups=experts * channels, cost=cost)
    router = find_router(parent, module, experts)
    if isinstance(router, str):
        return f"{place}: {router}"
    own = sum(parameter.numel() for parameter in module.parameters() if len(parameter) == experts)
    return WholeExperts(**shared, groups=experts, cost=(own + router.parameters) // experts, router=router)


def find_shared_experts(layer: nn.Module, index: int, kind: Kind) -> LinearBlock | str:
    """The MLP that all tokens pass beside the routed experts. Result and errors as `find_experts`."""
    found = _experts_in(layer)
    if found is None:
        return NO_EXPERTS
    place, parent, module = found
    names = [f"{place}.{name}" for name in _SHARED if isinstance(getattr(parent, name, None), nn.Module)]
    paths = names + [name for name in _SHARED if isinstance(getattr(layer, name, None), nn.Module)]
    if not paths:
        return NO_EXPERTS
    block = block_at(layer, index, kind, paths[0])
    down = _projection(module, "down_proj", index)
    if isinstance(block, str) or down is None:
        return block if isinstance(block, str) else f"{place}.experts has no known set of projections"
    if hasattr(parent, "shared_expert_gate"):
        # What it writes is multiplied by a factor of each token's own.
        block = replace(block, adds=None)
    stated = name_in(module.config, SHARED_WIDTHS) is not None
    multiple = 0 if stated else block.groups // down.parameter.shape[down.columns]
    return replace(block, follows=multiple, parent=None if "." not in paths[0] else parent)


def has_experts(layer: nn.Module) -> bool:
    """Whether a decoder layer has experts."""
    return _experts_in(layer) is not None


class _RowsOfTokens(torch.autograd.Function):
    """[R, H], each row's token of [S, H].

    The gradients of a token's rows are added in fixed order; those of a tensor that is indexed are not.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, routed: Routed) -> Tensor:
        ctx.routed, ctx.tokens = routed, len(hidden)
        return hidden.index_select(0, routed.tokens)

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor, None]:
        return _sums_by_token(rows, ctx.routed, ctx.tokens), None


def _sums_by_token(rows: Tensor, routed: Routed, tokens: int) -> Tensor:
    """[S, H], the sum of each token's rows of [R, H], in the order of its experts; differentiable."""
    if len(rows) == tokens * routed.chosen:
        placed = rows.index_select(0, routed.row_at)
    else:
        placed = rows.new_zeros(tokens * routed.chosen, rows.shape[1]).index_copy(0, routed.places, rows)
    return placed.view(tokens, routed.chosen, -1).sum(1)


def _routed(chosen: Tensor, routing: Tensor, experts: int) -> Routed:
    """chosen: [S, K] int64, numbers of experts, of which those from `experts` on are none; routing: [S, K]."""
    flat = chosen.flatten()
    counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
    rows = flat.argsort(stable=True)[: sum(counts)]
    return Routed(rows, chosen.shape[1], routing.flatten()[rows], tuple(counts))


def _experts_in(layer: nn.Module) -> tuple[str, nn.Module, Any] | None:
    """Attribute of the module of a decoder layer that calls the experts' module, it, and the experts' module."""
    for place in _PLACES:
        parent = getattr(layer, place, None)
        module = getattr(parent, "experts", None)
        if isinstance(parent, nn.Module) and isinstance(module, nn.Module):
            return place, parent, module
    return None


def _projection(module: nn.Module, name: str, layer: int) -> ExpertProjection | None:
    """The projection of that name; None where there is none."""
    parameter = getattr(module, name, None)
    if not isinstance(parameter, nn.Parameter) or parameter.ndim != 3:
        return None
    if not parameter.is_floating_point():
        raise UnsupportedArchitectureError(
            f"base_model: layer {layer}'s experts are of {parameter.dtype}; gradprune prunes floating-point weights "
            "(load the model unquantised)"
        )
    return ExpertProjection(module, name, bool(getattr(module, "is_transposed", False)))
