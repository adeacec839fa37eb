"""`Run`: the state shared by all stages of a pruning run."""

from dataclasses import dataclass, field
from functools import cached_property

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gradprune.config import PruneConfig
from gradprune.data.samples import Samples
from gradprune.data.windows import batches
from gradprune.evaluation.tasks import Tasks
from gradprune.models import PrunableModel
from gradprune.progress import QUIET, Clock
from gradprune.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Run:
    """A model with the options and the samples of one run.

    view: the model with its prunable blocks. tokenizer: the model's, to continue the prompts; None if there is none.
    tasks: zero-shot questions for the dense and the pruned model, if any. prompts: texts that both models continue.
    clock: times the stages. console: where progress is shown. ranks: the processes that share the work.
    """

    view: PrunableModel
    config: PruneConfig
    samples: Samples
    tokenizer: PreTrainedTokenizerBase | None = None
    tasks: Tasks | None = None
    prompts: tuple[str, ...] = ()
    clock: Clock = field(default_factory=Clock)
    console: Console = QUIET
    ranks: Ranks = ALONE

    @cached_property
    def calibration(self) -> list[Tensor]:
        """The calibration samples in batches [N, T]."""
        return list(batches(self.samples.calibration, self.config.batch_size))

    @cached_property
    def held_out(self) -> list[Tensor]:
        """The held-out samples in batches [N, T]; repair and search choose their settings on them."""
        return list(batches(self.samples.held_out, self.config.batch_size))
