"""What a layer's routed experts accumulate over calibration: each expert is a small MLP on the tokens routed to it.

A group is a channel of an expert, or the expert as a whole with its row of the router. Whole experts are also scored by
what they write: `reap` is the mean over the tokens that expert j sees of gate_j * ||f_j(x)||, with f_j its output
(router-weighted expert activation pruning, arXiv:2510.13999).

A token belongs to its sample wherever it is routed, so importances are exact by sample: an expert's tokens are laid out
by sample, short samples filled up with zeros, which add nothing to a gradient. In the sums over tokens that `wanda`
takes the root of, a token that an expert does not see counts as zero.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradprune.calibration.accumulator import BlockAccumulator, accumulation_dtype
from gradprune.calibration.capture import observed_linear, observed_product
from gradprune.calibration.methods import Depth
from gradprune.config import Method, ReductionName
from gradprune.errors import ConfigError
from gradprune.models import PrunableModel
from gradprune.models.experts import ExpertProjection, ExpertsBlock, Routed, WholeExperts
from gradprune.ops.vectors import GradientStatistics, ImportanceVectors, Side


def scores_experts_alone(view: PrunableModel) -> bool:
    """Whether every block is of whole experts, so that what is defined for these alone can be collected."""
    return all(isinstance(block, WholeExperts) for block in view.blocks)


def check_experts(view: PrunableModel, method: Method, reduction: ReductionName) -> None:
    """Refuse what there is not for mixtures of experts, or only for them.

    Raises:
        ConfigError: "obs" or the reduction "batch"; "reap" for anything but whole experts.
    """
    if method == "reap" and not scores_experts_alone(view):
        others = sorted({block.kind.name for block in view.blocks if not isinstance(block, WholeExperts)})
        raise ConfigError(
            f"importance_method: 'reap' scores whole experts, and {', '.join(others)} are to be scored; prune the kind "
            "'experts' alone, of a mixture of experts"
        )
    if not view.has_experts:
        return
    if method == "obs":
        raise ConfigError(
            "importance_method: 'obs' needs the inverse of a Gram matrix for each expert, which sees too few tokens; "
            "choose 'group_fisher' or 'taylor_2nd' for a mixture of experts"
        )
    if reduction == "batch":
        raise ConfigError("reduction: 'batch' is not made for a mixture of experts; choose 'sample'")


@dataclass(frozen=True)
class _Layout:
    """Where the rows of an expert lie by sample.

    sample, position: [S] int64, of each row its sample, and which of the sample's rows it is. shape: [N, T'].
    """

    sample: Tensor
    position: Tensor
    shape: tuple[int, int]

    def by_sample(self, rows: Tensor) -> Tensor:
        """[N, T', K] of rows [S, K]: the tokens of each sample, zeros behind them."""
        laid = rows.new_zeros(*self.shape, rows.shape[1])
        laid[self.sample, self.position] = rows
        return laid


def _layout(tokens: Tensor, samples: int, length: int) -> _Layout:
    """tokens: [S] int64, ascending numbers of the tokens of a batch of `samples` with `length` tokens each."""
    sample = tokens // length
    counts = torch.bincount(sample, minlength=samples)
    position = torch.arange(len(tokens), device=tokens.device) - (counts.cumsum(0) - counts)[sample]
    return _Layout(sample, position, (samples, int(counts.max())))


class ExpertsAccumulator(BlockAccumulator):
    """Sums over samples of the importances of a layer's expert channels."""

    block: ExpertsBlock

    def discard(self) -> None:
        """Drop the pending contributions of the current step."""
        super().discard()
        self._seen: set[int] = set()

    def commit(self, scale: float = 1.0) -> None:
        """Add the pending contributions, as if the step's gradients had been multiplied by `scale`."""
        if len(self._seen) < self.block.experts:
            # The gradients of an expert without tokens are zero.
            statistics = self.pending.statistics
            for name in statistics.keys() & {projection.name for projection in self.block.projections}:
                statistics[name] = replace(statistics[name], min_abs=torch.zeros_like(statistics[name].min_abs))
        super().commit(scale)

    @contextmanager
    def attached(self, depth: Depth) -> Iterator[None]:
        """The experts compute expert by expert, and are observed."""
        handle = self.block.parent.register_forward_pre_hook(self._enter, with_kwargs=True)
        try:
            with self.block.run_by(partial(self._product, depth)):
                yield
        finally:
            handle.remove()

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._enter(_module, args, kwargs)
        self._pending_tokens = self._shape.numel()

    def _product(self, depth: Depth, routed: Routed, projection: ExpertProjection, x: Tensor) -> Tensor:
        """A projection of all experts, observed."""
        is_output = projection is self.block.down
        product = partial(projection.product, routed)
        if depth is Depth.INPUTS and is_output:
            return self._observe_input(routed, x, product(x))
        if depth is Depth.WEIGHTS or (depth is Depth.MASKS and is_output):
            observer = partial(self._observe, depth, self._layouts(routed), projection)
            return observed_product(x, product, partial(projection.transposed_product, routed), observer)
        return product(x)

    def _observe_input(self, routed: Routed, x: Tensor, y: Tensor) -> Tensor:
        """Accumulate in passes without gradients, from the output projection's inputs x [R, C]; returns y [R, H]."""
        for expert, part in routed.by_expert(x.detach()):
            found = part.to(accumulation_dtype(x)).square().sum(0)
            self._added.input_square[self.block.channels_of(expert)] += found
        return y

    def _layouts(self, routed: Routed) -> dict[int, _Layout]:
        """By expert that sees tokens, how its rows are laid out."""
        samples, length = self._shape
        return {expert: _layout(tokens, samples, length) for expert, tokens in routed.by_expert(routed.tokens)}

    def _observe(
        self,
        depth: Depth,
        layouts: dict[int, _Layout],
        projection: ExpertProjection,
        x: Tensor,
        dy: Tensor,
        dx: Tensor,
    ) -> None:
        """Accumulate from the backward pass of one projection; x: [R, I], dy: [R, O], dx: [R, I]."""
        counts = [len(layout.sample) for layout in layouts.values()]
        for (expert, layout), *rows in zip(layouts.items(), *(each.split(counts) for each in (x, dy, dx)), strict=True):
            of_x, of_dy, of_dx = (layout.by_sample(each) for each in rows)
            if depth is Depth.WEIGHTS:
                weight = projection.weight(expert).contiguous()
                side: Side = "columns" if projection is self.block.down else "rows"
                self._accumulate(projection, expert, self._ops.linear_importance(of_x, of_dy, weight, side))
            if projection is self.block.down:
                self._observe_output(expert, of_x, of_dy, of_dx)

    def _observe_output(self, expert: int, x: Tensor, dy: Tensor, dx: Tensor) -> None:
        """Gradients of masks on the expert's groups; all by sample: [N, T', I], [N, T', O], [N, T', I]."""
        found = self._ops.mask_gradient(x, dx)
        self._added.input_square[self.block.channels_of(expert)] += found.input_square.sum(0)
        by_channel = found.gradient.double()
        gate = by_channel.sum(1)
        bias = self.block.down.bias_of(expert)
        if bias is not None:
            gate = gate + dy.sum(1).double() @ bias.detach().double()
        self._added.mask_square[self.block.groups_of(expert)] += self._of_masks(by_channel, gate).square().sum(0)
        self.pending.gate = gate if self.pending.gate is None else self.pending.gate + gate

    def _of_masks(self, by_channel: Tensor, _gate: Tensor) -> Tensor:
        """[N, groups], the gradients of masks on an expert's groups.

        Args:
            by_channel: [N, C], of masks on its channels.
            gate: [N], of a mask on its output.
        """
        return by_channel

    def _accumulate(self, projection: ExpertProjection, expert: int, vectors: ImportanceVectors) -> None:
        self._seen.add(expert)
        groups = self.block.groups_of(expert)
        if projection is self.block.down:
            sums = list(vectors.sums("columns"))
        else:
            sums = [self.block.fold_rows(rows) for rows in vectors.sums("rows")]
        self._added.weights[:, groups] += torch.stack([self.block.fold_channels(channels) for channels in sums])
        self._merge(projection.name, vectors.statistics)

    def _merge(self, name: str, statistics: GradientStatistics[Tensor]) -> None:
        """Add an expert's statistics to those of the experts before it."""
        found = [statistics]
        if name in self.pending.statistics:
            found.insert(0, self.pending.statistics[name])
        self.pending.statistics[name] = GradientStatistics.stack(found).merge()

    def _first_order(self, count: int) -> Tensor:
        return self.sums.first / count

    def _folded_weights(self, column_scale: Tensor | None) -> Tensor:
        found = []
        for expert in range(self.block.experts):
            columns = self.block.down.weight(expert).detach().double().abs().sum(0)
            if column_scale is None:
                rows = self.block.gate_up.weight(expert).detach().double().abs().sum(1)
                columns = columns + self.block.fold_rows(rows)
            else:
                columns = columns * column_scale[self.block.channels_of(expert)]
            found.append(self.block.fold_channels(columns))
        return torch.cat(found)


class WholeExpertsAccumulator(ExpertsAccumulator):
    """Sums over samples of the importances of a layer's experts, each with its row of the router.

    reap: [experts], sum over the tokens that an expert sees of gate * ||output||; routed: [experts], their number.
    """

    block: WholeExperts

    more_sums = ("reap", "routed")

    @contextmanager
    def attached(self, depth: Depth) -> Iterator[None]:
        """The experts are observed, and the router where weights' gradients are taken."""
        with super().attached(depth), self.block.router.logits_by(partial(self._logits, depth)):
            yield

    def component(self, name: str, count: int) -> Tensor:
        """[experts] fp64, one of `gradprune.calibration.methods.COMPONENTS`, of `count` gradients."""
        if name == "reap":
            return self.sums.by_name["reap"] / self.sums.by_name["routed"].clamp_min(1.0)
        return super().component(name, count)

    def _logits(self, depth: Depth, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The router's logits of tokens x [..., H], observed."""
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
            # Once, however often the layer is computed.
            if depth is Depth.INPUTS:
                self._add_written(routed, written)
            elif y.requires_grad:
                y.register_hook(lambda _dy: self._add_written(routed, written))
        return y

    def _add_written(self, routed: Routed, written: Tensor) -> None:
        """Add what the experts write: [R], gate * ||output||."""
        for expert, part in routed.by_expert(written):
            self._added.by_name["reap"][expert] += part.double().sum()
            self._added.by_name["routed"][expert] += len(part)

    def _of_masks(self, _by_channel: Tensor, gate: Tensor) -> Tensor:
        return gate[:, None]
