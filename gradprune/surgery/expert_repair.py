"""Repair of routed experts: each one's output projection is re-solved on the tokens that are sent to it.

For a token s that the router sends to it with factor g_s, expert j writes g_s W_j z_s, with z_s [C] its channels. Its
problem is that of `gradprune.surgery.least_squares` with x = g_s z_s and the target

    t = g_s W_j z_s + g_s^2 / (sum of squared factors of s's experts) d_s.

d_s is what the layer's experts lack at s before any is re-solved: blend (z - W x) as there; where whole experts are
gone and their tokens see others, also what the dense experts would write for this input less what they do now. An
expert's own bias stays. An expert that sees fewer tokens than `TOKENS_PER_CHANNEL` asks for is left as it is.
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
"""Calibration tokens that an expert has to see for each channel that it keeps; with fewer the ridge decides.

Measured on a trained mixture of 8 experts, from 0 to 2 the perplexity is the same but for the third digit."""


@dataclass(frozen=True)
class ExpertReads:
    """What a layer's experts read for the tokens of a batch; between calls it is kept where streams are.

    routed: which tokens they see. inputs: [R, C], what their output projections read.
    lacking: [S, O], d_s for each token; None where nothing is lacking.
    """

    routed: Routed
    inputs: Tensor
    lacking: Tensor | None

    def problem(self, expert: int, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """An expert's x [r, C] and t [r, O], on the device of its weight [O, C]; None where t is W x."""
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
        """[S], the sum of squared factors of each token's experts; 1 where there are none."""
        assert self.lacking is not None
        gates = self.routed.gates.to(accumulation_dtype(self.lacking)).square()
        squares = gates.new_zeros(len(self.lacking))
        # Expert by expert, each of which sees a token once: added at once the order would be left to a GPU.
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
    """Per batch, what a layer's experts, which are in memory, read and lack.

    Args:
        streams, before, written: the batches, the stream before the layer, and what modules before the experts write.
        block, kept: the experts, and what is kept of them: [groups] bool.
        wanted: per batch, z, what they would have to write; None where it is what they would write whole.
        blend: how much of the way there they are to go.
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
    """How a layer's experts are re-solved.

    block, kept: the experts, and what is kept of them: [groups] bool. aimed: whether any batch lacks something.
    ranks: the processes that divide the batches. ridges: as of `least_squares`.
    """

    block: ExpertsBlock
    kept: Tensor
    aimed: bool
    ranks: Ranks
    ridges: Sequence[float]

    def solve(
        self, fitted: Sequence[ExpertReads], judging: Sequence[ExpertReads], tokens_per_channel: float
    ) -> tuple[float, float, float] | None:
        """Re-solve in place what each expert keeps of its output projection; what goes stays as it is.

        Args:
            fitted: the batches that problems are solved on.
            judging: those that choose the ridge.
            tokens_per_channel: an expert that sees fewer among `fitted` is left as it is.

        Returns:
            The median of the ridges, and the error before and after of all experts that were solved for, as of
            `BlockRepair`; None if none was.
        """
        counts = torch.zeros(self.block.experts, dtype=torch.int64)
        for of in fitted:
            counts += torch.tensor(of.routed.counts)
        seen = self.ranks.sum(counts).tolist()
        found = []
        for expert in range(self.block.experts):
            channels = self.block.kept_channels(expert, self.kept)
            if len(channels) and seen[expert] >= max(1.0, tokens_per_channel * len(channels)):
                found.append(self._solve_one(expert, channels, fitted, judging))
        if not found:
            return None
        total = sum(square for _, square in found) or 1.0
        before = sum(one.error_before * square for one, square in found) / total
        after = sum(min(one.error, one.error_before) * square for one, square in found) / total
        return median(one.ridge for one, _ in found), before, after

    def _solve_one(
        self, expert: int, channels: Tensor, fitted: Sequence[ExpertReads], judging: Sequence[ExpertReads]
    ) -> tuple[Fit, float]:
        """The solution, and ||t||^2 of the tokens that choose the ridge. channels: [K] int64, those that it keeps."""
        weight = self.block.down.weight(expert)
        columns = channels.to(weight.device)
        solved, judge = (
            self._moments(of, expert, weight).of_output(weight, columns, float(self.aimed)) for of in (fitted, judging)
        )
        best = fit(solved, judge, self.ridges)
        best.write(weight, columns)
        return best, float(judge.square)

    def _moments(self, reads: Sequence[ExpertReads], expert: int, weight: Tensor) -> Moments:
        sums = MomentSums(weight, aimed=self.aimed)
        for of in reads:
            sums.add(*of.problem(expert, weight))
        return sums.total(self.ranks, f"layer {self.block.layer}'s {self.block.down.name} of expert {expert}")
