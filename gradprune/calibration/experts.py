"""What a layer's routed experts accumulate over calibration: each expert is a small MLP on the tokens routed to it.

A token belongs to its sample wherever it is routed, so importances are exact by sample: an expert's tokens are laid out
by sample, short samples filled up with zeros, which add nothing to a gradient. In the sums over tokens that `wanda`
takes the root of, a token that an expert does not see counts as zero.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradprune.calibration.accumulator import BlockAccumulator, accumulation_dtype
from gradprune.calibration.capture import observed_product
from gradprune.calibration.methods import Depth
from gradprune.config import Method, ReductionName
from gradprune.errors import ConfigError
from gradprune.models import PrunableModel
from gradprune.models.experts import ExpertsBlock
from gradprune.ops.dispatch import ImportanceOps
from gradprune.ops.vectors import GradientStatistics, ImportanceVectors


def check_experts(view: PrunableModel, method: Method, reduction: ReductionName) -> None:
    """Refuse what there is not for mixtures of experts.

    Raises:
        ConfigError: "obs", the reduction "batch", or layers that are streamed.
    """
    if not view.has_experts:
        return
    if method == "obs":
        raise ConfigError(
            "importance_method: 'obs' needs the inverse of a Gram matrix for each expert, which sees too few tokens; "
            "choose 'group_fisher' or 'taylor_2nd' for a mixture of experts"
        )
    if reduction == "batch":
        raise ConfigError("reduction: 'batch' is not made for a mixture of experts; choose 'sample'")
    if view.residency is not None:
        raise ConfigError("stream_layers: a mixture of experts is not streamed; choose 'off'")


class ExpertsAccumulator(BlockAccumulator):
    """Sums over samples of the importances of a layer's expert channels."""

    block: ExpertsBlock

    def __init__(self, block: ExpertsBlock, ops: ImportanceOps, device: torch.device) -> None:
        """As `BlockAccumulator`."""
        super().__init__(block, ops, device)
        self._shape = torch.Size(())

    def discard(self) -> None:
        """Drop the pending contributions of the current step."""
        super().discard()
        self._seen: set[int] = set()

    def commit(self, scale: float = 1.0) -> None:
        """Add the pending contributions, as if the step's gradients had been multiplied by `scale`."""
        if len(self._seen) < self.block.experts:
            # The gradients of an expert without tokens are zero.
            self.pending.statistics = {
                name: replace(found, min_abs=torch.zeros_like(found.min_abs))
                for name, found in self.pending.statistics.items()
            }
        super().commit(scale)

    @contextmanager
    def attached(self, depth: Depth) -> Iterator[None]:
        """The experts compute one by one, and are observed."""
        handle = self.block.parent.register_forward_pre_hook(self._enter, with_kwargs=True)
        try:
            with self.block.run_by(partial(self._product, depth)):
                yield
        finally:
            handle.remove()

    def _enter(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the batch's shape, before the tokens of all samples are put into one row."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self._shape = hidden.shape[:-1]
        self._pending_tokens = hidden.shape[:-1].numel()

    def _product(
        self, depth: Depth, tokens: Tensor, name: str, expert: int, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """One product of an expert with `tokens` ([S] int64, numbers of the batch's tokens), observed."""
        is_output = name == self.block.down.name
        if depth is Depth.INPUTS and is_output:
            found = x.detach().to(accumulation_dtype(x)).square().sum(0)
            self._pending_input_square[self.block.groups_of(expert)] += found
        if depth is Depth.WEIGHTS or (depth is Depth.MASKS and is_output):
            layout = self._layout(tokens)
            return observed_product(x, weight, bias, partial(self._observe, depth, layout, name, expert))
        return F.linear(x, weight, bias)

    def _layout(self, tokens: Tensor) -> tuple[Tensor, Tensor, int]:
        """Sample and position in it of each of an expert's tokens ([S], ascending), and the longest sample's length."""
        samples, length = self._shape
        sample = tokens // length
        counts = torch.bincount(sample, minlength=samples)
        position = torch.arange(len(tokens), device=tokens.device) - (counts.cumsum(0) - counts)[sample]
        return sample, position, int(counts.max())

    def _by_sample(self, rows: Tensor, layout: tuple[Tensor, Tensor, int]) -> Tensor:
        """[N, T', K] of rows [S, K]: the tokens of each sample, zeros behind them."""
        sample, position, longest = layout
        laid = rows.new_zeros(self._shape[0], longest, rows.shape[1])
        laid[sample, position] = rows
        return laid

    def _observe(
        self,
        depth: Depth,
        layout: tuple[Tensor, Tensor, int],
        name: str,
        expert: int,
        x: Tensor,
        dy: Tensor,
        dx: Tensor,
    ) -> None:
        """Accumulate from the backward pass of one projection; x: [S, I], dy: [S, O], dx: [S, I]."""
        laid_x, laid_dy = self._by_sample(x, layout), self._by_sample(dy, layout)
        projection = next(each for each in self.block.projections if each.name == name)
        is_output = projection is self.block.down
        if depth is Depth.WEIGHTS:
            weight = projection.weight(expert).contiguous()
            vectors = self._ops.linear_importance(laid_x, laid_dy, weight, "columns" if is_output else "rows")
            self._accumulate(name, expert, vectors)
        if is_output:
            self._observe_output(expert, laid_x, laid_dy, self._by_sample(dx, layout))

    def _observe_output(self, expert: int, x: Tensor, dy: Tensor, dx: Tensor) -> None:
        """Gradients of masks on the expert's channels; all by sample: [N, T', I], [N, T', O], [N, T', I]."""
        found = self._ops.mask_gradient(x, dx)
        groups = self.block.groups_of(expert)
        self._pending_input_square[groups] += found.input_square
        by_channel = found.gradient.double()
        self._pending_sums[2, groups] += by_channel.square().sum(0)
        gate = by_channel.sum(1)
        bias = self.block.down.bias_of(expert)
        if bias is not None:
            gate = gate + dy.sum(1).double() @ bias.detach().double()
        self.pending.gate = gate if self.pending.gate is None else self.pending.gate + gate

    def _accumulate(self, name: str, expert: int, vectors: ImportanceVectors) -> None:
        self._seen.add(expert)
        groups = self.block.groups_of(expert)
        if name == self.block.down.name:
            absolute, square = vectors.sums("columns")
        else:
            sums = vectors.sums("rows")
            absolute, square = self.block.fold_rows(sums.abs), self.block.fold_rows(sums.square)
        self._pending_sums[0, groups] += absolute
        self._pending_sums[1, groups] += square
        self._merge(name, vectors.statistics)

    def _merge(self, name: str, statistics: GradientStatistics[Tensor]) -> None:
        """Add an expert's statistics to those of the experts before it."""
        found = [statistics]
        if name in self.pending.statistics:
            found.insert(0, self.pending.statistics[name])
        self.pending.statistics[name] = GradientStatistics.stack(found).merge()

    def _first_order(self, count: int) -> Tensor:
        return self.first / count

    def _folded_weights(self, column_scale: Tensor | None) -> Tensor:
        found = []
        for expert in range(self.block.experts):
            columns = self.block.down.weight(expert).detach().double().abs().sum(0)
            if column_scale is None:
                rows = self.block.gate_up.weight(expert).detach().double().abs().sum(1)
                columns = columns + self.block.fold_rows(rows)
            found.append(columns)
        total = torch.cat(found)
        return total if column_scale is None else total * column_scale
