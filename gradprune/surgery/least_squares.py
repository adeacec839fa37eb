"""Least-squares repair: re-solve the output projections with which the remaining weights write to the residual stream.

A block with output projection W [O, I] keeps the columns K. Let x be the projection's input in the model as pruned and
repaired so far (blocks are solved in the order in which the data passes them), G the sum of x x^T over calibration
tokens, and t the target. Then

    W'_K = argmin sum ||t - W' x_K||^2 + ridge ||W' - W_K||^2 = W_K + (E_K - W_K G_KK) (G_KK + ridge 1)^-1,

with E_K = sum t x_K^T. The target is between what the whole block would write for this input and z, the output with
which the residual stream after the block would be that of the dense model:

    t = W x + blend (z - W x),  z = (stream before, dense) - (stream before, repaired) + W x_dense.

With blend 0 each block is solved by itself; a blend above 0 also compensates for the errors of earlier blocks, even in
blocks that keep all their groups. ridge is relative to the mean of G_KK's diagonal. No bias is added, and no shape
changes. (Least-squares reconstruction of a pruned layer's output: He et al. 2017, arXiv:1707.06168.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradprune.models import Block, LinearBlock, PrunableModel
from gradprune.models.blocks import take_columns
from gradprune.models.experts import ExpertsBlock
from gradprune.models.footprint import EXPERTS_STREAMS, REPAIR_STREAMS
from gradprune.models.masks import GroupMasks
from gradprune.models.streams import Streams, drained, read_bytes, stream_bytes
from gradprune.ranks import ALONE, Ranks
from gradprune.surgery.expert_repair import TOKENS_PER_CHANNEL, ExpertsSolver, expert_reads
from gradprune.surgery.masking import mask_output, masked_outputs
from gradprune.surgery.moments import MomentSums, fit

BLEND = 0.5
"""Measured on SmolLM2-135M, pruned by 20 and 50 % by two methods: a blend of 0 was never better on held-out text, and
0.06 nats worse at 50 %."""
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Candidates, ascending, relative to the mean diagonal. Each problem uses the one with the smallest error on held-out
samples, searched from the middle while the error falls: in all of 276 cases on SmolLM2-135M the error had a single
minimum."""


@dataclass(frozen=True)
class BlockRepair:
    """What the repair did to one block.

    kind, layer: name the block.
    ridge: the ridge chosen; for experts, the median of their ridges.
    error_before, error: ||t - W_K x_K||^2 / ||t||^2 with the weights before and after the repair, on the held-out
        samples (on the calibration samples if there are none); for experts, over all that were solved for.
    """

    kind: str
    layer: int
    ridge: float
    error_before: float
    error: float


class Repaired(NamedTuple):
    """The outcome of a repair.

    blocks: one entry for every block that was solved for.
    dense: per batch of this rank's calibration samples, then of its held-out samples, the dense model's residual stream
        [N, T, H] after its last layer; empty if the repair did not compute it.
    """

    blocks: list[BlockRepair]
    dense: list[Tensor]


@torch.no_grad()
def least_squares(
    view: PrunableModel,
    masks: GroupMasks,
    samples: Sequence[Tensor],
    held_out: Sequence[Tensor],
    *,
    blend: float = BLEND,
    ridges: Sequence[float] = RIDGES,
    tokens_per_channel: float = TOKENS_PER_CHANNEL,
    ranks: Ranks = ALONE,
    advance: Callable[[], None] = lambda: None,
) -> Repaired:
    """Zero the output columns of pruned groups and re-solve the kept ones, in memory of their own.

    Args:
        view: the model, not cut.
        masks: the groups that each block keeps. The output of a block that keeps none is zeroed.
        samples: batches of calibration samples' token ids, [N, T] int64 each.
        held_out: batches of held-out samples, which choose among `ridges`; if empty, `samples` choose.
        blend: from 0 to 1, see the module's docstring; with 0 only pruned blocks are solved for.
        ridges: candidates, at least one, ascending.
        tokens_per_channel: an expert that sees fewer tokens per kept channel is left as it is.
        ranks: the processes that divide the batches of `samples` and `held_out`; every rank passes all batches, and
            solves every block from the sums over all ranks.
        advance: called after each block.

    Returns:
        What was done to each block, and the dense model's streams. If no solution for a block was better on the
        held-out samples, its kept weights are unchanged, and the two errors are equal.

    G and E are accumulated in fp32 (fp64 for fp64 models), for one block at a time, and solved in fp64; if G cannot be
    factored, the ridge is multiplied by ten. Weights are rounded once, to their own dtype. For experts see
    `gradprune.surgery.expert_repair`. The result is deterministic.

    Raises:
        NonFiniteError: an input or a target of a block is NaN or infinite.
    """
    own, judged = ranks.share(samples), ranks.share(held_out)
    batches = [*own, *judged]
    kept = REPAIR_STREAMS + (EXPERTS_STREAMS if view.has_experts else 0)
    streams = Streams(view, batches, kept * stream_bytes(view, batches) + read_bytes(view, batches))
    first = streams.take_first()
    judged_from = len(own) if held_out else None
    state = _Repair(view, masks, streams, judged_from, blend, ridges, tokens_per_channel, ranks, first, first)
    for layer in range(len(view.layers)):
        with view.resident(layer, layer + 1):
            state.pass_layer(layer, advance)
    return Repaired(state.repairs, state.dense if blend or not state.differs else [])


@dataclass
class _Repair:
    """A repair in progress: the repaired and the dense model's streams, [N, T, H] per batch, advance layer by layer.

    judged_from: index of the first batch that chooses ridges; problems are solved on the batches before it. None if all
        batches are used for both.
    dense: the dense model's streams; the same as `repaired` with blend 0, and until a block has been pruned.
    differs: whether the current block or an earlier one has been pruned.
    ridge_of: by kind, the ridge of the latest block, where the search for the next one's starts.
    repairs: what was done to the blocks so far.
    """

    view: PrunableModel
    masks: GroupMasks
    streams: Streams
    judged_from: int | None
    blend: float
    ridges: Sequence[float]
    tokens_per_channel: float
    ranks: Ranks
    dense: list[Tensor]
    repaired: list[Tensor]
    differs: bool = False
    ridge_of: dict[str, float] = field(default_factory=dict)
    repairs: list[BlockRepair] = field(default_factory=list)

    def pass_layer(self, layer: int, advance: Callable[[], None]) -> None:
        """Repair the blocks of a layer, which is in memory, in order of execution."""
        blocks = self.view.of_layer(layer)
        untouched = not self.differs and all(self.masks[block].all() for block in blocks)
        gap = None
        if self.blend and not untouched:
            before, self.dense = list(self.dense), []
            gap = _StreamGap(self.streams, layer, before, self.repaired)
        # Per batch, what the layer's blocks passed so far write, by their modules.
        written: list[dict[nn.Module, Tensor]] = [{} for _ in self.repaired]
        for block in () if untouched else blocks:
            self._pass_block(block, written, gap)
        self.repaired = [
            self.streams.run_layer(layer, batch, stream, writes)
            for batch, (stream, writes) in enumerate(zip(drained(self.repaired), drained(written), strict=True))
        ]
        self.dense = self.repaired if gap is None else gap.after
        for _ in blocks:
            advance()

    def _pass_block(self, block: Block, written: list[dict[nn.Module, Tensor]], gap: "_StreamGap | None") -> None:
        """Repair a block and run it; add what it writes to `written`."""
        kept = self.masks[block]
        self.differs |= not kept.all()
        wanted = None if gap is None else gap.wanted(block)
        if isinstance(block, ExpertsBlock):
            writes = self._pass_experts(block, written, wanted)
        elif not kept.any():
            self._silence(block, kept)
            writes = [stream.new_zeros(()).expand_as(stream) for stream in self.repaired]
        else:
            assert isinstance(block, LinearBlock)
            writes = self._pass_linear(block, written, wanted)
        for batch, write in enumerate(writes):
            written[batch][block.module] = write
            if gap is not None:
                gap.advance(block, batch, write)

    def _pass_linear(
        self, block: LinearBlock, written: list[dict[nn.Module, Tensor]], wanted: list[Tensor] | None
    ) -> list[Tensor]:
        """Solve for the kept columns of a block's output projection, run it, and return what it writes per batch."""
        kept, output = self.masks[block], block.output
        device, bias = output.linear.weight.device, output.linear.bias
        columns = output.columns_of(kept.nonzero().flatten()).to(device)
        solves = self.differs and (wanted is not None or not kept.all())
        sums = []
        if solves:
            problems = 1 if self.judged_from is None else 2
            sums = [MomentSums(output.weight, aimed=wanted is not None) for _ in range(problems)]
        read = []
        for batch, stream in enumerate(self.repaired):
            x = self.streams.output_input(block, batch, stream, written[batch])
            if solves:
                aim = None if wanted is None else wanted[batch].to(device)
                judging = self.judged_from is not None and batch >= self.judged_from
                (sums[-1] if judging else sums[0]).add(x, aim if aim is None or bias is None else aim - bias)
            read.append(self.streams.keep(x if kept.all() else take_columns(x, columns)))
        if solves:
            self._solve(block, columns, sums)
        weight = output.weight if kept.all() else output.weight[:, columns]
        return [self.streams.keep(F.linear(x.to(device), weight, bias)) for x in drained(read)]

    def _solve(self, block: LinearBlock, columns: Tensor, sums: Sequence[MomentSums]) -> None:
        """Solve for the given columns ([K] int64) of a block's output projection, and zero the others."""
        weight = block.output.weight
        name = f"layer {block.layer}'s {block.output.path}"
        problems = [each.total(self.ranks, name).of_output(weight, columns, self.blend) for each in sums]
        found = fit(problems[0], problems[-1], self.ridges, self.ridge_of.get(block.kind.name))
        self.ridge_of[block.kind.name] = found.ridge
        error = min(found.error, found.error_before)
        self.repairs.append(BlockRepair(block.kind.name, block.layer, found.ridge, found.error_before, error))
        with self.view.rewriting(block, [f"{block.output.path}.weight"]):
            block.mask(self.masks[block])
            found.write(block.output.weight, columns)

    def _pass_experts(
        self, block: ExpertsBlock, written: list[dict[nn.Module, Tensor]], wanted: list[Tensor] | None
    ) -> list[Tensor]:
        """Repair a layer's experts, run them, and return what they write per batch."""
        kept = self.masks[block]
        if self.differs and (wanted is not None or not kept.all()):
            reads = expert_reads(self.streams, block, kept, self.repaired, written, wanted, self.blend)
            aimed = wanted is not None or block.reroutes(kept)
            solver = ExpertsSolver(block, kept, aimed, self.ranks, self.ridges)
            with self.view.rewriting(block, [block.down.name]):
                found = solver.solve(reads[: self.judged_from], reads[self.judged_from :], self.tokens_per_channel)
            if found is not None:
                self.repairs.append(BlockRepair(block.kind.name, block.layer, *found))
        # The experts run before pruned ones are zeroed, because masking whole experts also reroutes their tokens.
        writes = masked_outputs(self.streams, block, kept, self.repaired, written)
        self._silence(block, kept)
        return writes

    def _silence(self, block: Block, kept: Tensor) -> None:
        """Zero what a block's pruned groups write, in memory of its own, without re-solving anything."""
        if not kept.all():
            with self.view.rewriting(block, [path for path, _ in block.output_parameters()]):
                mask_output(block, kept)


class _StreamGap:
    """The difference, per batch, of the dense and the repaired stream within a layer, before the current block.

    after: per batch, the dense stream after the layer.
    """

    def __init__(self, streams: Streams, layer: int, dense: list[Tensor], repaired: Sequence[Tensor]) -> None:
        """Pass the dense streams, which are taken out of their list, through the layer; begin at its first block."""
        self._streams = streams
        # Between a block's `wanted` and its `advance`, this holds what the block would have to write.
        self._gaps: list[Tensor] = []
        self._written: list[dict[nn.Module, Tensor]] = []
        self.after: list[Tensor] = []
        for batch, stream in enumerate(drained(dense)):
            after, written = streams.layer_and_written(layer, batch, stream)
            self._gaps.append(streams.keep(stream - repaired[batch]))
            self._written.append(written)
            self.after.append(after)

    def wanted(self, block: Block) -> list[Tensor]:
        """Per batch, the output [N, T, O] with which a block would make the repaired stream equal to the dense one.

        If no fixed multiple of the output is added to the stream, because a norm or a gate follows the block, it is the
        dense block's output instead, and `advance` does nothing.
        """
        own = [written.pop(block.module) for written in self._written]
        if block.adds is None:
            return own
        for batch, write in enumerate(drained(own)):
            self._gaps[batch] = self._streams.keep(self._gaps[batch].view_as(write) / block.adds + write)
        return list(self._gaps)

    def advance(self, block: Block, batch: int, write: Tensor) -> None:
        """Move past a block, for one batch, given what the block writes now."""
        if block.adds is not None:
            self._gaps[batch] = self._streams.keep(block.adds * (self._gaps[batch].view_as(write) - write))
