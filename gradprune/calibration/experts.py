"""Accumulators of a layer's routed experts: each expert is treated as a small MLP on the tokens routed to it.

A group is a channel of an expert, or a whole expert with its row of the router. Whole experts are also scored by what
they write: `reap` is the mean over the tokens that expert j sees of gate_j * ||f_j(x)||, with f_j its output
(router-weighted expert activation pruning, arXiv:2510.13999).

A token belongs to its sample wherever it is routed, so importances are exact by sample: an expert's tokens are arranged
by sample, and shorter samples are padded with zeros, which add nothing to a gradient. In the mean over tokens whose
root `wanda` uses, a token that an expert does not see counts as zero.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gradprune.accumulation import accumulation_dtype
from gradprune.calibration.accumulator import BlockAccumulator, absolute_sums, norm_of
from gradprune.calibration.capture import observed_linear, observed_product
from gradprune.calibration.methods import Depth
from gradprune.config import Method, ReductionName
from gradprune.errors import ConfigError
from gradprune.models import PrunableModel
from gradprune.models.experts import ExpertProjection, ExpertsBlock, Routed, WholeExperts
from gradprune.models.modes import hooks_removed
from gradprune.ops.vectors import GradientStatistics


def scores_experts_alone(view: PrunableModel) -> bool:
    """Whether every block consists of whole experts, so that "reap", defined only for these, can be collected."""
    return all(isinstance(block, WholeExperts) for block in view.blocks)


def check_experts(view: PrunableModel, method: Method, reduction: ReductionName) -> None:
    """Refuse methods and reductions that are not defined for the view's kinds of blocks.

    Raises:
        ConfigError: the reduction is "batch" and there are routed experts; the method is "obs" and there are whole
            experts; or the method is "reap" and there is anything except whole experts.
    """
    if method == "reap" and not scores_experts_alone(view):
        others = sorted({block.kind.name for block in view.blocks if not isinstance(block, WholeExperts)})
        raise ConfigError(
            f"importance_method: 'reap' scores whole experts only, not {', '.join(others)}; prune only the kind "
            "'experts', in a mixture of experts"
        )
    if not view.has_experts:
        return
    if method == "obs" and any(isinstance(block, WholeExperts) for block in view.blocks):
        raise ConfigError(
            "importance_method: 'obs' scores channels that others can make up for; choose 'group_fisher', 'reap' or "
            "'taylor_2nd' for whole experts"
        )
    if reduction == "batch":
        raise ConfigError("reduction: 'batch' is not available for mixtures of experts; choose 'sample'")


def _offsets(routed: Routed, samples: int, length: int) -> Tensor:
    """[E * N + 1] int64: where each expert's rows of each sample begin, and the end; nothing is copied to the host."""
    device = routed.tokens.device
    experts = torch.arange(len(routed.counts), device=device)
    counts = torch.tensor(routed.counts, device=device)
    expert = experts.repeat_interleave(counts, output_size=len(routed.tokens))
    # Ascending, because rows are ordered by expert and then by token.
    places = expert * samples + routed.tokens // length
    return torch.searchsorted(places, torch.arange(len(experts) * samples + 1, device=device))


def _by_sample(rows: Tensor, counts: list[int]) -> Tensor:
    """Arrange an expert's rows [S, K] as [N, T', K], padded with zeros; counts: the number of rows of each sample."""
    return pad_sequence(rows.split(counts), batch_first=True)


class ExpertsAccumulator(BlockAccumulator):
    """Accumulator of a layer's routed experts, whose groups are the experts' channels."""

    block: ExpertsBlock

    @contextmanager
    def attached(self, depth: Depth) -> Iterator[None]:
        """Context manager in which the experts are computed one by one, and observed as steps of `depth` need it."""
        handle = self.block.parent.register_forward_pre_hook(self._enter, with_kwargs=True)
        with hooks_removed([handle]), self.block.run_by(partial(self._product, depth)):
            yield

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._enter(_module, args, kwargs)
        self._pending_tokens = self._shape.numel()

    def _product(self, depth: Depth, routed: Routed, projection: ExpertProjection, x: Tensor) -> Tensor:
        """[R, O]: one projection of all experts applied to x [R, I], observed as steps of `depth` need it."""
        is_output = projection is self.block.down
        product = partial(projection.product, routed)
        if depth is Depth.INPUTS and is_output:
            return self._observe_input(routed, x, product(x))
        if depth is Depth.WEIGHTS or (depth is Depth.MASKS and is_output):
            observer = partial(self._observe, depth, routed, self._shape, projection)
            return observed_product(x, product, partial(projection.transposed_product, routed), observer)
        return product(x)

    def _observe_input(self, routed: Routed, x: Tensor, y: Tensor) -> Tensor:
        """Sum the squares of the output projections' inputs x [R, C], without a backward pass; return y unchanged."""
        for expert, part in routed.by_expert(x.detach()):
            found = part.to(accumulation_dtype(x)).square().sum(0)
            self._added.input_square[self.block.channels_of(expert)] += found
        return y

    def _observe(
        self,
        depth: Depth,
        routed: Routed,
        shape: torch.Size,
        projection: ExpertProjection,
        x: Tensor,
        dy: Tensor,
        dx: Tensor,
    ) -> None:
        """Accumulate from one projection's backward pass; x: [R, I], dy: [R, O], dx: [R, I]; shape: (N, T)."""
        offsets = _offsets(routed, *shape)
        if depth is Depth.WEIGHTS:
            self._observe_weights(projection, offsets, x, dy)
        if projection is self.block.down:
            counts = offsets.diff().view(-1, shape[0]).tolist()
            for expert, rows in enumerate(routed.spans):
                if any(counts[expert]):
                    self._observe_output(expert, *(_by_sample(each[rows], counts[expert]) for each in (x, dy, dx)))

    def _observe_weights(self, projection: ExpertProjection, offsets: Tensor, x: Tensor, dy: Tensor) -> None:
        """Accumulate from the gradients of all experts' weights; offsets: see `grouped_linear_importance`."""
        is_output = projection is self.block.down
        # The gradient of a transposed weight is transposed too, so rows and columns, x and dy change places.
        by_columns = is_output != projection.transposed
        left, right = (dy, x) if projection.transposed else (x, dy)
        weights = projection.parameter.detach()
        side: Literal["rows", "columns"] = "columns" if by_columns else "rows"
        found = self._ops.grouped_linear_importance(left, right, weights, offsets, side)
        sums = found.sums(side).double()
        of_groups = self.block.fold_channels(sums if is_output else self.block.fold_rows(sums))
        self._added.weights += of_groups.transpose(0, 1).flatten(1)
        statistics = GradientStatistics.unpack(found.statistics.pack().double()).merge()
        self.pending.statistics[projection.name] = statistics

    def _observe_output(self, expert: int, x: Tensor, dy: Tensor, dx: Tensor) -> None:
        """Accumulate one expert's mask gradients; x: [N, T', I], dy: [N, T', O], dx: [N, T', I], padded by sample."""
        found = self._ops.mask_gradient(x, dx)
        self._added.input_square[self.block.channels_of(expert)] += found.input_square.sum(0)
        by_channel = found.gradient.double()
        gate = by_channel.sum(1)
        bias = self.block.down.bias_of(expert)
        if bias is not None:
            gate = gate + dy.sum(1).double() @ bias.detach().double()
        if self._curvature:
            of_expert = self._added.output_square[expert]
            norm_of(dy, of_expert)
            of_expert.square_()
        self._added.mask_square[self.block.groups_of(expert)] += self._of_masks(by_channel, gate).square().sum(0)
        self.pending.gate = gate if self.pending.gate is None else self.pending.gate + gate

    def _of_masks(self, by_channel: Tensor, _gate: Tensor) -> Tensor:
        """[N, groups]: each sample's gradients of masks on an expert's groups.

        Args:
            by_channel: [N, C], the gradients of masks on the expert's channels.
            gate: [N], the gradient of a mask on the expert's output.
        """
        return by_channel

    def curvatures(self, samples: int) -> Tensor:
        """[experts]: the curvature of each expert's output projection, see `BlockAccumulator.curvatures`."""
        mean: Tensor = self.sums.output_square / (samples * self.block.down.weight(0).shape[0])
        return mean

    def _first_order(self, count: int) -> Tensor:
        return self.sums.first / count

    def _folded_weights(self, column_scale: Tensor | None) -> Tensor:
        found = []
        for expert in range(self.block.experts):
            columns = absolute_sums(self.block.down.weight(expert), 0)
            if column_scale is None:
                rows = absolute_sums(self.block.gate_up.weight(expert), 1)
                columns = columns + self.block.fold_rows(rows)
            else:
                columns = columns * column_scale[self.block.channels_of(expert)]
            found.append(self.block.fold_channels(columns))
        return torch.cat(found)


class WholeExpertsAccumulator(ExpertsAccumulator):
    """Accumulator of a layer's routed experts, whose groups are whole experts, each with its row of the router.

    Further sums: `reap`, [experts], gate * ||output|| summed over the tokens that an expert sees; `routed`, [experts],
    the number of these tokens.
    """

    block: WholeExperts

    more_sums = ("reap", "routed")

    @contextmanager
    def attached(self, depth: Depth) -> Iterator[None]:
        """See `ExpertsAccumulator.attached`; also observes the router if weight gradients are computed."""
        with super().attached(depth), self.block.router.logits_by(partial(self._logits, depth)):
            yield

    def component(self, name: str, count: int) -> Tensor:
        """[experts] fp64: `reap`, or a component of any block, see `BlockAccumulator.component`."""
        if name == "reap":
            return self.sums.by_name["reap"] / self.sums.by_name["routed"].clamp_min(1.0)
        return super().component(name, count)

    def _logits(self, depth: Depth, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., experts]: the router's logits for tokens x [..., H]; observed if weight gradients are computed."""
        if depth is Depth.WEIGHTS:
            return observed_linear(x, weight, bias, partial(self._observe_router, weight, self._shape))
        return F.linear(x, weight, bias)

    def _observe_router(self, weight: Tensor, shape: torch.Size, x: Tensor, dy: Tensor, _dx: Tensor) -> None:
        vectors = self._ops.linear_importance(x.view(*shape, -1), dy.view(*shape, -1), weight.detach(), "rows")
        self._added.weights += vectors.sums("rows")
        self.pending.statistics[self.block.router.path] = vectors.statistics

    def _product(self, depth: Depth, routed: Routed, projection: ExpertProjection, x: Tensor) -> Tensor:
        y = super()._product(depth, routed, projection, x)
        if projection is self.block.down:
            dtype = accumulation_dtype(y)
            written = routed.gates.detach().to(dtype) * torch.linalg.vector_norm(y.detach(), dim=1, dtype=dtype)
            # Count each token once even if the layer is recomputed: only one of the two runs has a gradient.
            if depth is Depth.INPUTS:
                self._add_written(routed, written)
            elif y.requires_grad:
                y.register_hook(lambda _dy: self._add_written(routed, written))
        return y

    def _add_written(self, routed: Routed, written: Tensor) -> None:
        """Add what each row's expert writes, gate * ||output|| [R], to the sums `reap` and `routed`."""
        for expert, part in routed.by_expert(written):
            self._added.by_name["reap"][expert] += part.double().sum()
            self._added.by_name["routed"][expert] += len(part)

    def _of_masks(self, _by_channel: Tensor, gate: Tensor) -> Tensor:
        return gate[:, None]
