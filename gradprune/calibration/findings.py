"""`Findings`: what an engine's steps recorded about losses and gradients, evaluated on the host."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradprune.calibration.accumulator import BlockAccumulator, StepRecord
from gradprune.calibration.finite import raise_non_finite_gradient, raise_non_finite_loss, raise_overflow
from gradprune.calibration.host import records_on_host
from gradprune.calibration.reduction import Reduction
from gradprune.models import Block, BlockKey, PrunableModel
from gradprune.ops.vectors import GradientStatistics
from gradprune.vanishing.scaling import GradientScaling, resolve_fix
from gradprune.vanishing.statistics import LayerGradients, layer_gradients


@dataclass(frozen=True)
class Findings:
    """What consecutive steps of an engine recorded.

    view, blocks: the model, and its blocks by key. reduction: how samples are reduced.
    samples, losses: the token ids [N, T] and the samples' losses [N] of each step.
    records: for each block, its records of the steps, on the CPU.
    first: the number of samples before these steps.
    """

    view: PrunableModel
    blocks: Mapping[BlockKey, Block]
    reduction: Reduction
    samples: Sequence[Tensor]
    losses: Sequence[Tensor]
    records: Mapping[BlockKey, Sequence[StepRecord]]
    first: int = 0

    @classmethod
    def of(
        cls,
        view: PrunableModel,
        reduction: Reduction,
        accumulators: Mapping[BlockKey, BlockAccumulator],
        records: Mapping[BlockKey, Sequence[StepRecord]],
        samples: Sequence[Tensor],
        losses: Sequence[Tensor],
        first: int = 0,
    ) -> "Findings":
        """Create findings from records that may be on a GPU; they are all copied to the host together."""
        blocks = {key: accumulator.block for key, accumulator in accumulators.items()}
        return cls(view, blocks, reduction, samples, losses, records_on_host(records), first)

    def check_finite(self, steps_before: int = 0) -> None:
        """Raise if a step had a non-finite loss or gradient.

        steps_before: the number of the engine's steps before these, for naming a batch.

        Raises:
            NonFiniteError: a loss or gradient was NaN or infinite; names the sample (or batch) and the layer.
        """
        if not self.losses:
            return
        raise_non_finite_loss(self.view, list(self.samples), torch.cat(list(self.losses)), self.first)
        records = {key: list(steps) for key, steps in self.records.items()}
        unit = self.reduction.name
        raise_non_finite_gradient(records, unit, self.first if unit == "sample" else steps_before)
        raise_overflow(records)

    def gradients(self, steps: slice, *, scaled: bool = False) -> list[LayerGradients]:
        """Each layer's gradient statistics over some steps, which all computed every weight's gradient.

        steps: which of these steps; the list is empty if there are none.
        scaled: whether the statistics are of the gradients as scaled when they were added, or before any scaling.
        """
        count = sum(self.reduction.gradients_in(ids) for ids in self.samples[steps])
        if not count:
            return []
        merged: dict[int, dict[str, GradientStatistics[float]]] = {}
        elements: dict[int, dict[str, int]] = {}
        for key, records in self.records.items():
            block, chosen = self.blocks[key], records[steps]
            for path, size in block.weights():
                name = f"{block.path}.{path}"
                of_steps = GradientStatistics.stack([record.statistics[path] for record in chosen])
                if scaled:
                    of_steps = of_steps.scale([record.scale for record in chosen])
                merged.setdefault(key.layer, {})[name] = of_steps.merge().to_float()
                elements.setdefault(key.layer, {})[name] = size
        return [layer_gradients(layer, merged[layer], elements[layer], count) for layer in sorted(merged)]

    def applied_scaling(self, fix: str) -> GradientScaling | None:
        """How `fix` scaled the batches' gradients before they were added; None if they were not scaled."""
        if fix == "none" or self.reduction.scales_afterwards:
            return None
        scales = [1.0] * len(self.view.layers)
        for key, records in self.records.items():
            scales[key.layer] = math.fsum(record.scale for record in records) / len(records)
        after = self.gradients(slice(None), scaled=True)
        return GradientScaling(resolve_fix(fix, self.gradients(slice(None))), scales, after)

    def gate_gradients(self) -> dict[BlockKey, float]:
        """The mean loss's gradient with respect to a gate (of value 1) on each block's output."""
        return {
            key: torch.cat([record.gate for record in records if record.gate is not None]).mean().item()
            for key, records in self.records.items()
        }
