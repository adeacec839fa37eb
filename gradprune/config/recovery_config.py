"""The options of `gradprune recover`."""

from dataclasses import dataclass
from typing import Literal

from gradprune.config.domains import at_least, finite, numbers
from gradprune.config.option import Options, option
from gradprune.errors import RecoveryError

RecoveryMethod = Literal["lora", "full"]
Loss = Literal["kd", "lm"]


@dataclass(frozen=True)
class RecoveryConfig(Options):
    """Recovery."""

    method: RecoveryMethod = option(
        "full", "Train all weights (full) or, in less memory, low-rank updates that are merged at the end (lora)."
    )
    loss: Loss = option("kd", "Match the teacher's predictions (kd), or predict the text (lm).")
    minutes: float = option(
        10.0,
        "Minutes to train for; the number of steps is planned from a timed forward and backward pass.",
        numbers("above 0", lambda x: x > 0.0),
    )
    steps: int | None = option(
        None, "Number of optimizer steps, instead of minutes; reproducible on the same machine.", at_least(1)
    )
    learning_rate: float | None = option(
        None, "Peak learning rate; default 2e-3 for lora, 5e-4 for full.", finite("above 0", lambda x: x > 0.0)
    )
    lora_rank: int = option(16, "Rank of the low-rank updates of lora.", at_least(1))
    seq_len: int = option(128, "Tokens per sample.", at_least(2))
    batch_size: int = option(8, "Samples per step.", at_least(1))
    checks: int = option(4, "Number of times that held-out loss is measured and the state is saved.", at_least(1))
    seed: int = option(0, "Seed for the order of the samples and the initial low-rank updates.", at_least(0))

    @property
    def peak_rate(self) -> float:
        """The largest learning rate."""
        return self.learning_rate or {"lora": 2e-3, "full": 5e-4}[self.method]

    def check_teacher(self, *, given: bool) -> None:
        """Raise RecoveryError if the loss needs a teacher and none is given."""
        if self.loss == "kd" and not given:
            raise RecoveryError(
                "teacher: loss 'kd' learns from the dense model; give its folder or hub id, or choose loss 'lm'"
            )
