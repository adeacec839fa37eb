"""`PruneResult`: the result of a pruning run."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from gradprune.calibration.evidence import Evidence
from gradprune.config import PruneConfig
from gradprune.evaluation.perplexity import Perplexity
from gradprune.evaluation.speed import Throughput
from gradprune.evaluation.tasks import TaskAccuracy
from gradprune.models import describe
from gradprune.models.masks import GroupMasks
from gradprune.scoring.over_pruning import LayerPruning, pruning_distribution, pruning_warning
from gradprune.scoring.table import GroupTable
from gradprune.scoring.warnings import selection_warnings
from gradprune.search import SearchResult
from gradprune.surgery.distillation import Distillation
from gradprune.surgery.repair import BlockRepair, repair_warning
from gradprune.vanishing.analysis import GradientAnalysis


@dataclass(frozen=True)
class Measured:
    """Measurements of a model before or after pruning.

    parameters: their number; tied ones count once. bytes_on_disk: size of the weight files, or of the tensors if there
    are no files. tasks: zero-shot accuracies on the requested tasks. generations: the model's continuation of each of
    the run's prompts.
    """

    parameters: int
    bytes_on_disk: int
    perplexity: Perplexity
    speed: Throughput | None = None
    tasks: tuple[TaskAccuracy, ...] = ()
    generations: tuple[str, ...] = ()


@dataclass(frozen=True)
class PruneResult:
    """The result of a pruning run.

    model: the pruned model. before, after: measurements of the dense and the pruned model.
    table, pruned: every group with its score, and whether it was pruned.
    masks: which groups each block kept. gradients: the layers' gradients before and after scaling.
    evidence: statistics from calibration, to rescore without calibrating again. repairs: the least-squares repair of
        each block. distillation: the outcome of distillation; None if there was none.
    search: the trials, if importance_method was "auto"; `config` then holds the chosen settings.
    seconds: wall time by stage. output: the results folder; None if nothing was written.
    evaluation_overlap: the fraction of the evaluation text that occurs in the calibration text.
    prompts: the texts that the models' `generations` continue.
    """

    model: PreTrainedModel
    config: PruneConfig
    before: Measured
    after: Measured
    table: GroupTable
    pruned: NDArray[np.bool_]
    masks: GroupMasks
    gradients: GradientAnalysis
    evidence: Evidence
    repairs: list[BlockRepair] = field(default_factory=list)
    search: SearchResult | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    output: Path | None = None
    evaluation_overlap: float = 0.0
    prompts: tuple[str, ...] = ()
    distillation: Distillation | None = None

    @property
    def distribution(self) -> list[LayerPruning]:
        """By layer, the fraction of each block's groups that was pruned."""
        return pruning_distribution(self.masks)

    @property
    def over_pruning_warning(self) -> str | None:
        """A warning that names over-pruned blocks and what to try next; None if there are none."""
        return pruning_warning(self.distribution, self.config)

    @property
    def held_out(self) -> bool:
        """Whether perplexity was measured on text that was not used for calibration."""
        return self.evaluation_overlap == 0.0

    @property
    def warnings(self) -> list[str]:
        """Warnings about deviations from the request and suspicious results; the over-pruning warning is the last."""
        found = list(selection_warnings(self.table, self.pruned, self.before.parameters, self.config))
        if not self.held_out:
            found.append(
                f"{self.evaluation_overlap:.0%} of the evaluation text occurs in the calibration text, so "
                "the perplexity is not measured on held-out text. Give another --eval_dataset."
            )
        widest = max((block.solved_columns for block in describe(self.model).blocks), default=0)
        if (hardly_determined := repair_warning(widest, self.config)) is not None:
            found.append(hardly_determined)
        if (over_pruned := self.over_pruning_warning) is not None:
            found.append(over_pruned)
        return found
