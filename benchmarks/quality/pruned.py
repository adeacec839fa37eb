"""A run's model without the chosen groups: as cut, as repaired, and as distilled after the repair."""

from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedModel

from gradprune.models import describe
from gradprune.models.masks import GroupMasks
from gradprune.run import Run
from gradprune.surgery.cut import cut, sharing_copy
from gradprune.surgery.distillation import distil_run, taught_samples
from gradprune.surgery.repair import REPAIRS, Repaired


def repaired_copy(run: Run, masks: GroupMasks) -> tuple[PreTrainedModel, Repaired]:
    """Return a cut copy of the run's model, repaired by the run's options, and the report of the repair."""
    model = sharing_copy(run.view.model)
    repaired = REPAIRS[run.config.repair](replace(run, view=describe(model)), masks)
    return cut(model, masks, inplace=True), repaired


@dataclass(frozen=True)
class Pruned:
    """The three models of one choice, each made by its method; the repaired and the distilled one share the repair."""

    run: Run
    masks: GroupMasks

    def as_cut(self) -> PreTrainedModel:
        """The cut model, with the remaining weights as they were."""
        return cut(self.run.view.model, self.masks)

    def repaired(self) -> PreTrainedModel:
        """The cut model, repaired by the run's options."""
        return self._repaired[0]

    def distilled(self) -> PreTrainedModel:
        """The repaired model, also distilled if the run has the samples for it."""
        model, repaired = self._repaired
        taught = taught_samples(self.run, repaired)
        if taught is None:
            return model
        model = sharing_copy(model)
        distil_run(self.run, model, taught)
        return model

    @cached_property
    def _repaired(self) -> tuple[PreTrainedModel, Repaired]:
        return repaired_copy(self.run, self.masks)
