"""Repair of routed experts: each expert's output projection is re-solved on the tokens that are sent to it.

For a token s that the router sends to expert j with factor g_s, the expert writes g_s W_j z_s, where z_s [C] are the
values of its channels. Its problem is that of `gradprune.surgery.least_squares` with x = g_s z_s and the target

    t = g_s W_j z_s + g_s^2 / (sum of squared factors of s's experts) d_s.

d_s is what the layer's experts lack at s before any is re-solved: blend (z - W x), as defined there. If whole experts
are removed, so that their tokens see other experts, it also includes the difference between what the dense experts
would write for this input and what the remaining ones write. An expert's bias does not change. An expert that sees
fewer tokens than `TOKENS_PER_CHANNEL` requires is left as it is.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import torch
from torch import Tensor, nn

from gradprune.accumulation import accumulation_dtype
from gradprune.models.experts import ExpertsBlock, Routed
from gradprune.models.streams import Streams
from gradprune.ranks import Ranks
from gradprune.surgery.moments import Fit, Moments, MomentSums, fit

TOKENS_PER_CHANNEL = 0.5
"""Calibration tokens that an expert has to see per kept channel to be re-solved; fewer would leave it to the ridge.

On a trained mixture of 8 experts, values from 0 to 2 give perplexities that differ only in the third digit."""


@dataclass(frozen=True)
class ExpertReads:
    """What a layer's experts read for the tokens of a batch; the tensors are kept where the streams are.

    routed: which tokens each expert sees. inputs: [R, C], the inputs of the experts' output projections.
    lacking: [S, O], d_s for each token; None if nothing is lacking.
    """

    routed: Routed
    inputs: Tensor
    lacking: Tensor | None

    def problem(self, expert: int, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """An expert's x [r, C] and t [r, O], on the device of its weight W [O, C]; None in place of t if t = W x."""
        rows = self.routed.spans[expert]
        dtype = accumulation_dtype(weight)
        factors = self.routed.gates[rows].to(weight.device, dtype)[:, None]
        x = factors * self.inputs[rows].to(weight.device, dtype)
        if self.lacking is None:
            return x, None
        tokens = self.routed.tokens[rows]
        share = factors.square() / self._squares[tokens].to(factors)[:, None]
        return x, x @ weight.T.to(dtype) + share * self.lacking[tokens].to(factors)

    @cached_property
    def _squares(self) -> Tensor:
        """The sum of squared factors of each token's experts, [S]; 1 if that is 0, as for a token without experts."""
        assert self.lacking is not None
        gates = self.routed.gates.to(accumulation_dtype(self.lacking)).square()
        squares = gates.new_zeros(len(self.lacking))
        # Expert by expert, because each sees a token only once: in a single addition over all rows, a GPU would add a
        # token's factors in any order.
        for rows in self.routed.spans:
            squares[self.routed.tokens[rows]] += gates[rows]
        return squares.masked_fill_(squares == 0.0, 1.0)


def expert_reads(
    streams: Streams,
    block: ExpertsBlock,
    kept: Tensor,
    before: Sequence[Tensor],
    written: Sequence[dict[nn.Module, Tensor]],
    wanted: Sequence[Tensor] | None,
    blend: float,
) -> list[ExpertReads]:
    """Return, per batch, what a layer's experts, which are in memory, read and lack.

    Args:
        streams: runs the layers on the batches.
        block: the experts.
        kept: [groups] bool, the groups that they keep.
        before: per batch, the residual stream before the layer.
        written: per batch, what the layer's earlier blocks write, by their modules.
        wanted: per batch, z, what the experts would have to write; None: what they write without pruning.
        blend: how far the target goes from what the unpruned experts write (0) to z (1).
    """
    rerouted = block.reroutes(kept)
    with block.masked(kept) if rerouted else nullcontext():
        seen = [streams.expert_inputs(block, k, stream, written[k]) for k, stream in enumerate(before)]
    found = []
    for k, (routed, inputs, wrote) in enumerate(seen):
        lacking = None
        if rerouted or wanted is not None:
            own = streams.block_output(block, k, before[k], written[k]) if rerouted else wrote
            aim = own if wanted is None else torch.lerp(own, wanted[k].view_as(own), blend)
            lacking = streams.keep((aim - wrote).flatten(0, -2))
        found.append(ExpertReads(routed, inputs, lacking))
    return found


@dataclass(frozen=True)
class ExpertsSolver:
    """Re-solves the experts of a layer.

    block: the experts. kept: [groups] bool, the groups that they keep. aimed: whether the batches have `lacking`.
    ranks: the processes that divide the batches. ridges: see `least_squares`.
    """

    block: ExpertsBlock
    kept: Tensor
    aimed: bool
    ranks: Ranks
    ridges: Sequence[float]

    def solve(
        self, fitted: Sequence[ExpertReads], judging: Sequence[ExpertReads], tokens_per_channel: float
    ) -> tuple[float, float, float] | None:
        """Re-solve in place the columns that each expert keeps of its output projection; the others do not change.

        Args:
            fitted: the batches that problems are solved on.
            judging: the batches that choose the ridge.
            tokens_per_channel: an expert that sees fewer tokens of `fitted` per kept channel is left as it is.

        Returns:
            The median of the ridges, and the error before and after over all experts that were solved for, see
            `BlockRepair`; None if no expert was.
        """
        counts = torch.zeros(self.block.experts, dtype=torch.int64)
        for batch in fitted:
            counts += torch.tensor(batch.routed.counts)
        seen = self.ranks.sum(counts).tolist()
        found = []
        for expert in range(self.block.experts):
            channels = self.block.kept_channels(expert, self.kept)
            if len(channels) and seen[expert] >= max(1.0, tokens_per_channel * len(channels)):
                found.append(self._solve_one(expert, channels, fitted, judging))
        if not found:
            return None
        total = sum(square for _, square in found) or 1.0
        before = sum(solved.error_before * square for solved, square in found) / total
        after = sum(min(solved.error, solved.error_before) * square for solved, square in found) / total
        return median(solved.ridge for solved, _ in found), before, after

    def _solve_one(
        self, expert: int, channels: Tensor, fitted: Sequence[ExpertReads], judging: Sequence[ExpertReads]
    ) -> tuple[Fit, float]:
        """Solve for an expert's kept channels ([K] int64); also return sum ||t||^2 over the tokens of `judging`."""
        weight = self.block.down.weight(expert)
        columns = channels.to(weight.device)
        solved, judge = (
            self._moments(reads, expert, weight).of_output(weight, columns, float(self.aimed))
            for reads in (fitted, judging)
        )
        best = fit(solved, judge, self.ridges)
        best.write(weight, columns)
        return best, float(judge.square)

    def _moments(self, reads: Sequence[ExpertReads], expert: int, weight: Tensor) -> Moments:
        sums = MomentSums(weight, aimed=self.aimed)
        for batch in reads:
            sums.add(*batch.problem(expert, weight))
        return sums.total(self.ranks, f"layer {self.block.layer}'s {self.block.down.name} of expert {expert}")
