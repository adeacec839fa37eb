"""Mixtures of experts: the routed experts of a decoder layer as a block, and how all of them are run together.

transformers keeps the weights of a layer's experts in three-dimensional parameters of one module, whose `forward`
receives the tokens with their routing. All experts of a module have the same width, so pruning either keeps the same
number of channels in each of them, or removes whole experts together with their rows of the router.
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
    """Which tokens are sent to which experts: a row for each pair of a token and one of its experts, sorted by expert.

    places: [R] int64, the flat index of each row in [S, K], which holds for each of S tokens its K experts. Indices
        ascend within an expert.
    chosen: K, the number of experts per token.
    gates: [R], for each row the factor by which the expert's output is multiplied.
    counts: for each expert, its number of rows.
    """

    places: Tensor
    chosen: int
    gates: Tensor
    counts: tuple[int, ...]

    @cached_property
    def tokens(self) -> Tensor:
        """[R] int64: the index of each row's token."""
        return self.places // self.chosen

    @cached_property
    def spans(self) -> tuple[slice, ...]:
        """The slice of rows that belongs to each expert."""
        ends = itertools.accumulate(self.counts, initial=0)
        return tuple(slice(start, end) for start, end in itertools.pairwise(ends))

    @cached_property
    def row_at(self) -> Tensor:
        """[R] int64: the row of each place, the inverse of `places`; only valid if every place has a row, R = S * K."""
        return torch.empty_like(self.places).index_copy_(
            0, self.places, torch.arange(len(self.places), device=self.places.device)
        )

    def to(self, device: torch.device) -> "Routed":
        """Return a copy whose tensors are on `device`."""
        return replace(self, places=self.places.to(device), gates=self.gates.to(device))

    def by_expert(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield each expert that sees any tokens, with its part of `rows` [R, ...]."""
        for expert, part in enumerate(rows.split(self.counts)):
            if len(part):
                yield expert, part


ExpertProduct = Callable[["Routed", "ExpertProjection", Tensor], Tensor]
"""Computes a projection of all experts: maps its inputs x [R, I] to [R, O]."""


@dataclass(frozen=True)
class ExpertProjection:
    """The weights of one projection of all experts.

    module: the experts' module. The parameter is looked up in it at each use, because its parameters are replaced by
        other objects each time that a streamed layer is read.
    own: the parameter's name in `module`. transposed: whether an expert's weight is stored as [I, O].
    """

    module: nn.Module
    own: str
    transposed: bool

    @property
    def name(self) -> str:
        """The parameter's path in the block."""
        return f"experts.{self.own}"

    @property
    def parameter(self) -> nn.Parameter:
        """The weights of all experts as stored: [E, O, I], or [E, I, O] if transposed."""
        return self.module.get_parameter(self.own)

    @property
    def bias(self) -> nn.Parameter | None:
        """The biases of all experts, [E, O]; None if there are none."""
        found = getattr(self.module, f"{self.own}_bias", None)
        return found if isinstance(found, nn.Parameter) else None

    def weight(self, expert: int) -> Tensor:
        """A view [O, I] of an expert's weight."""
        own = self.parameter[expert]
        return own.T if self.transposed else own

    def bias_of(self, expert: int) -> Tensor | None:
        """A view [O] of an expert's bias; None if there are no biases."""
        bias = self.bias
        return None if bias is None else bias[expert]

    def product(self, routed: Routed, x: Tensor) -> Tensor:
        """Compute x W^T + b, [R, O], from x [R, I], each row with the weight and bias of its expert."""
        return torch.cat(
            [F.linear(part, self.weight(expert), self.bias_of(expert)) for expert, part in routed.by_expert(x)]
        )

    def transposed_product(self, routed: Routed, dy: Tensor) -> Tensor:
        """Compute dy W, [R, I], from dy [R, O], each row with the weight of its expert."""
        return torch.cat([times(part, self.weight(expert).to(dy.dtype)) for expert, part in routed.by_expert(dy)])

    @property
    def rows(self) -> int:
        """The dimension of the parameter that indexes an expert's outputs."""
        return 2 if self.transposed else 1

    @property
    def columns(self) -> int:
        """The dimension of the parameter that indexes an expert's inputs."""
        return 1 if self.transposed else 2


@dataclass(frozen=True)
class ExpertsBlock(Block):
    """The routed experts of a layer.

    gate_up: the input projections, in one parameter. parts: 2 (gate and up), or 1 without a gate.
    interleaved: whether rows of gate and up alternate; otherwise all rows of gate come before those of up.
    down: the output projection. parent: the module that routes the tokens and calls `module`.
    """

    gate_up: ExpertProjection
    down: ExpertProjection
    parts: int
    interleaved: bool
    parent: nn.Module

    @property
    def experts(self) -> int:
        """Number of routed experts in the layer."""
        return len(self.down.parameter)

    @property
    def channels(self) -> int:
        """Number of channels of each expert."""
        return self.down.parameter.shape[self.down.columns]

    @property
    def projections(self) -> tuple[ExpertProjection, ExpertProjection]:
        """The input projections `gate_up` and the output projection `down`."""
        return self.gate_up, self.down

    @property
    def outputs(self) -> int:
        """The number of output projections: one for each expert."""
        return self.experts

    @property
    def width(self) -> int:
        """Number of channels of all experts together."""
        return self.experts * self.channels

    @property
    def read_width(self) -> int:
        """Number of channels of the experts that a token sees."""
        return self.channels * (experts_of_token(self.module.config) or self.experts)

    @property
    def solved_columns(self) -> int:
        """0, for no warning is needed: the repair leaves an expert that sees too few tokens as it is."""
        return 0

    def channels_of(self, expert: int) -> slice:
        """The expert's slice of the channels of all experts."""
        return slice(expert * self.channels, (expert + 1) * self.channels)

    @abstractmethod
    def groups_of(self, expert: int) -> slice:
        """The slice of groups that belong to the expert."""

    def kept_channels(self, expert: int, kept: Tensor) -> Tensor:
        """Indices of the channels that an expert keeps, [K] int64; kept: [groups] bool."""
        return kept[self.groups_of(expert)].expand(self.channels).nonzero().flatten()

    def reroutes(self, _kept: Tensor) -> bool:
        """Whether tokens are sent to other experts when only the groups `kept` ([groups] bool) stay."""
        return False

    @abstractmethod
    def fold_channels(self, channels: Tensor) -> Tensor:
        """Sum the last dimension, an expert's channels [..., channels], over the channels of each of its groups."""

    def fold_rows(self, rows: Tensor) -> Tensor:
        """Sum an expert's rows of the input projections, [..., parts * channels], into its channels [..., channels]."""
        leading = rows.shape[:-1]
        if self.interleaved:
            return rows.reshape(*leading, -1, self.parts).sum(-1)
        return rows.reshape(*leading, self.parts, -1).sum(-2)

    def weights(self) -> Iterator[tuple[str, int]]:
        """Yield the path and the number of elements of the two three-dimensional parameters."""
        for projection in self.projections:
            yield projection.name, projection.parameter.numel()

    def output_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameter that holds all experts' output projections, with its path in the block."""
        yield self.down.name, self.down.parameter

    def writing_by(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Context manager that replaces the experts' output projections by `weights`, one [O, I] per expert."""
        stacked = torch.stack(list(weights))
        return value_replaced(self.down.parameter, stacked.mT if self.down.transposed else stacked)

    def run_by(self, product: ExpertProduct) -> AbstractContextManager[None]:
        """Context manager in which the experts' module computes its output by `run` with this `product`."""
        return forward_replaced(self.module, partial(self.run, product))

    def run(self, product: ExpertProduct, hidden: Tensor, chosen: Tensor, routing: Tensor) -> Tensor:
        """Compute what the experts' module computes, [S, H]; differentiable.

        Args:
            product: computes each of the two projections.
            hidden: the tokens' hidden states [S, H].
            chosen: the experts of each token, [S, K] int64.
            routing: the factors by which these experts' outputs are multiplied, [S, K].
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
    """The experts of a layer, pruned by channel: group e * channels + i is channel i of expert e."""

    @property
    def sets(self) -> int:
        """The number of experts: each expert's channels are a set."""
        return self.experts

    def groups_of(self, expert: int) -> slice:
        """The slice of the expert's channels, each of which is a group."""
        return self.channels_of(expert)

    def fold_channels(self, channels: Tensor) -> Tensor:
        """Return `channels` unchanged, because each channel is a group."""
        return channels

    def rows_of(self, channels: Tensor) -> Tensor:
        """Indices of the input projections' rows that belong to `channels` ([E, k] int64): [E, parts * k] int64."""
        if self.interleaved:
            return (channels[..., None] * self.parts + torch.arange(self.parts)).flatten(1)
        return torch.cat([channels + part * self.channels for part in range(self.parts)], 1)

    @torch.no_grad()
    def mask(self, kept: Tensor) -> None:
        """Zero the output projections' columns that belong to channels not kept."""
        gone = (~kept).view(self.experts, self.channels).to(self.down.parameter.device)
        along = gone[:, :, None] if self.down.transposed else gone[:, None, :]
        self.down.parameter.masked_fill_(along, 0.0)

    def cuts(self, groups: Tensor) -> Iterator[Cut]:
        """Yield the cuts of all experts' input projection rows and biases, and of their output projection columns.

        Raises:
            ValueError: the experts do not all keep the same number of channels, or they keep none.
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
    """The experts of a layer, pruned whole: group e is expert e with its row and other entries in the router."""

    router: Router

    @property
    def sets(self) -> int:
        """The number of sets into which the router divides the experts."""
        return self.router.sets

    @property
    def min_kept(self) -> int:
        """The number of experts that each set has to keep so that every token still gets as many experts as before."""
        return self.router.min_kept

    def groups_of(self, expert: int) -> slice:
        """The slice of one group: the expert itself."""
        return slice(expert, expert + 1)

    def reroutes(self, kept: Tensor) -> bool:
        """Whether any expert is removed, because its tokens are then sent to others."""
        return not bool(kept.all())

    def fold_channels(self, channels: Tensor) -> Tensor:
        """Sum over all channels, which belong to one group: [..., 1]."""
        return channels.sum(-1, keepdim=True)

    def weights(self) -> Iterator[tuple[str, int]]:
        """Yield the path and number of elements of the two three-dimensional parameters and of the router's weight."""
        yield from super().weights()
        yield self.router.path, self.router.weight.numel()

    def output_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that hold the output projections' weights and biases, with their paths in the block."""
        yield from super().output_parameters()
        if self.down.bias is not None:
            yield f"{self.down.name}_bias", self.down.bias

    @torch.no_grad()
    def mask(self, kept: Tensor) -> None:
        """Zero what removed experts write. Tokens are still sent to them; `masked` sends them to other experts."""
        gone = ~kept.to(self.down.parameter.device)
        for _, parameter in self.output_parameters():
            parameter[gone] = 0.0

    @contextmanager
    def masked(self, kept: Tensor) -> Iterator[None]:
        """Context manager in which no token is sent to an expert that is not kept: its router logits are -inf."""

        def logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            found = F.linear(x, weight, bias)
            return found.masked_fill(~kept.to(found.device), -torch.inf)

        with values_restored(self.router.corrections), self.router.logits_by(logits):
            with torch.no_grad():
                for correction in self.router.corrections:
                    correction.masked_fill_(~kept.to(correction.device), -torch.inf)
            yield

    def cuts(self, groups: Tensor) -> Iterator[Cut]:
        """Yield the cuts of everything in the experts' module and the router that has an entry for each expert.

        Raises:
            ValueError: too few experts stay, or the router's sets do not all keep the same number.
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
    """Compute a projection of all experts without observing it; an `ExpertProduct`."""
    return projection.product(routed, x)


def find_experts(layer: nn.Module, index: int, kind: Kind) -> ExpertsBlock | str:
    """Return the routed experts of a decoder layer, or the reason, for messages, why it has none that can be pruned.

    kind: "expert_channels" or "experts".

    Raises:
        UnsupportedArchitectureError: the experts' weights are not floating-point parameters.
    """
    found = _experts_in(layer)
    if found is None:
        return NO_EXPERTS
    place, parent, module = found
    # Before 5.20, transformers has no norm after experts, and no attribute that says whether there is one.
    if not hasattr(module, "is_concatenated") or getattr(module, "has_post_expert_norm", False):
        return f"{place}.experts has an unknown form"
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
    """Find the MLP of shared experts, which sees all tokens; result and errors are those of `find_experts`."""
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
        # The output of the shared experts is multiplied by a factor that differs from token to token.
        block = replace(block, adds=None)
    stated = name_in(module.config, SHARED_WIDTHS) is not None
    multiple = 0 if stated else block.groups // down.parameter.shape[down.columns]
    return replace(block, follows=multiple, parent=None if "." not in paths[0] else parent)


def has_experts(layer: nn.Module) -> bool:
    """Whether a decoder layer has routed experts."""
    return _experts_in(layer) is not None


class _RowsOfTokens(torch.autograd.Function):
    """Gathers the token of each row: `hidden` [S, H] to [R, H].

    The backward pass adds the gradients of a token's rows in a fixed order, unlike that of plain indexing.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, routed: Routed) -> Tensor:
        ctx.routed, ctx.tokens = routed, len(hidden)
        return hidden.index_select(0, routed.tokens)

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor, None]:
        return _sums_by_token(rows, ctx.routed, ctx.tokens), None


def _sums_by_token(rows: Tensor, routed: Routed, tokens: int) -> Tensor:
    """Sum the rows [R, H] of each token, in the order of its experts: [S, H]; differentiable."""
    if len(rows) == tokens * routed.chosen:
        placed = rows.index_select(0, routed.row_at)
    else:
        placed = rows.new_zeros(tokens * routed.chosen, rows.shape[1]).index_copy(0, routed.places, rows)
    return placed.view(tokens, routed.chosen, -1).sum(1)


def _routed(chosen: Tensor, routing: Tensor, experts: int) -> Routed:
    """Sort tokens by expert. chosen: [S, K] int64; indices from `experts` on are ignored. routing: [S, K], factors."""
    flat = chosen.flatten()
    counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
    rows = flat.argsort(stable=True)[: sum(counts)]
    return Routed(rows, chosen.shape[1], routing.flatten()[rows], tuple(counts))


def _experts_in(layer: nn.Module) -> tuple[str, nn.Module, Any] | None:
    """Return the attribute of the layer's module that calls the experts, that module, and the experts' module."""
    for place in _PLACES:
        parent = getattr(layer, place, None)
        module = getattr(parent, "experts", None)
        if isinstance(parent, nn.Module) and isinstance(module, nn.Module):
            return place, parent, module
    return None


def _projection(module: nn.Module, name: str, layer: int) -> ExpertProjection | None:
    """Return the experts' projection stored in the three-dimensional parameter `name`; None if there is none."""
    parameter = getattr(module, name, None)
    if not isinstance(parameter, nn.Parameter) or parameter.ndim != 3:
        return None
    if not parameter.is_floating_point():
        raise UnsupportedArchitectureError(
            f"base_model: layer {layer}'s experts are of {parameter.dtype}; gradprune prunes floating-point weights "
            "(load the model unquantised)"
        )
    return ExpertProjection(module, name, bool(getattr(module, "is_transposed", False)))
