"""How the gradients of several samples become one importance: sample by sample, or batch by batch.

This is the only place that knows the difference; everything else asks its `Reduction`.
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

    name: as options and files have it; what one gradient belongs to.
    accumulator: sums up one block of linear layers.
    scales_afterwards: whether a scale on a layer's gradients can be applied to the finished sums, exactly, so that
        any fix can be tried after calibration. If not, each batch's gradients are scaled before they are added.
    """

    name: ReductionName
    accumulator: type[LinearAccumulator]
    scales_afterwards: bool

    def accumulator_of(self, block: Block, ops: ImportanceOps, curvature: bool) -> BlockAccumulator:
        """What sums up one block; experts are summed by sample, see `check_experts`."""
        if isinstance(block, LinearBlock):
            return self.accumulator(block, ops, curvature)
        if isinstance(block, WholeExperts):
            return WholeExpertsAccumulator(block, ops, curvature)
        assert isinstance(block, ExpertsBlock)
        return ExpertsAccumulator(block, ops, curvature)

    def ledgers(self, view: PrunableModel, ops: ImportanceOps, curvature: bool) -> list[Ledger]:
        """What sums up all blocks: in one ledger a device, or one a layer where layers are committed by themselves."""
        together: dict[object, tuple[list[BlockAccumulator], torch.device]] = {}
        for block in view.blocks:
            device = view.device_of(block.layer)
            which = device if view.residency is None else block.layer
            entries, _ = together.setdefault(which, ([], device))
            entries.append(self.accumulator_of(block, ops, curvature))
        return [Ledger(entries, device) for entries, device in together.values()]

    def gradients_in(self, input_ids: Tensor) -> int:
        """How many gradients a step on `input_ids` [N, T] adds."""
        return len(input_ids) if self.name == "sample" else 1


REDUCTIONS: dict[ReductionName, Reduction] = {
    reduction.name: reduction
    for reduction in (
        Reduction("sample", SampleAccumulator, scales_afterwards=True),
        Reduction("batch", BatchAccumulator, scales_afterwards=False),
    )
}
