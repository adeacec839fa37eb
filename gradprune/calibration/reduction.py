"""How the gradients of several samples are reduced to one importance: sample by sample, or batch by batch.

Code that works with the sums asks its `Reduction`, and does not distinguish the two itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradprune.calibration.accumulator import (
    BatchAccumulator,
    BlockAccumulator,
    LinearAccumulator,
    SampleAccumulator,
)
from gradprune.calibration.experts import ExpertsAccumulator, WholeExpertsAccumulator
from gradprune.calibration.ledger import Ledger
from gradprune.config import ReductionName
from gradprune.models import Block, LinearBlock, PrunableModel
from gradprune.models.experts import ExpertsBlock, WholeExperts
from gradprune.ops.dispatch import ImportanceOps


@dataclass(frozen=True)
class Reduction:
    """A way to reduce samples.

    name: the name in options and files; also what one gradient belongs to, a sample or a batch.
    accumulator: the class of accumulators for blocks of linear layers.
    scales_afterwards: whether a scale on a layer's gradients can be applied exactly to the finished sums, so that any
        fix can be tried after calibration. If not, each batch's gradients are scaled before they are added.
    """

    name: ReductionName
    accumulator: type[LinearAccumulator]
    scales_afterwards: bool

    def accumulator_of(self, block: Block, ops: ImportanceOps, curvature: bool) -> BlockAccumulator:
        """Create the accumulator of one block; experts always accumulate by sample, see `check_experts`."""
        if isinstance(block, LinearBlock):
            return self.accumulator(block, ops, curvature)
        if isinstance(block, WholeExperts):
            return WholeExpertsAccumulator(block, ops, curvature)
        assert isinstance(block, ExpertsBlock)
        return ExpertsAccumulator(block, ops, curvature)

    def ledgers(self, view: PrunableModel, ops: ImportanceOps, curvature: bool) -> list[Ledger]:
        """Create the ledgers of all blocks: one per device, or one per layer for streamed models.

        A streamed model's layers are committed one by one.
        """
        together: dict[object, tuple[list[BlockAccumulator], torch.device]] = {}
        for block in view.blocks:
            device = view.device_of(block.layer)
            which = device if view.residency is None else block.layer
            entries, _ = together.setdefault(which, ([], device))
            entries.append(self.accumulator_of(block, ops, curvature))
        return [Ledger(entries, device) for entries, device in together.values()]

    def gradients_in(self, input_ids: Tensor) -> int:
        """The number of gradients that a step on `input_ids` [N, T] adds: N samples' or one batch's."""
        return len(input_ids) if self.name == "sample" else 1


REDUCTIONS: dict[ReductionName, Reduction] = {
    reduction.name: reduction
    for reduction in (
        Reduction("sample", SampleAccumulator, scales_afterwards=True),
        Reduction("batch", BatchAccumulator, scales_afterwards=False),
    )
}
