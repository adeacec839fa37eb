"""`GradientAnalysis`: a pruning run's gradients before and after scaling, for the terminal and for files."""

from dataclasses import dataclass
from typing import Any

from gradprune.vanishing.diagnosis import Diagnosis, diagnose_gradients
from gradprune.vanishing.scaling import GradientScaling
from gradprune.vanishing.statistics import LayerGradients


@dataclass(frozen=True)
class GradientAnalysis:
    """The layers' gradients, as measured during calibration.

    gradients: the layers' statistics over `num_samples` samples, before any scaling. steps: the same for each of the
        first batches.
    requested: name of the requested fix. scaling: what the fix did; None if no fix was requested.
    seq_len, num_samples, reduction: settings of the calibration.
    """

    gradients: list[LayerGradients]
    steps: list[list[LayerGradients]]
    requested: str
    scaling: GradientScaling | None
    seq_len: int
    num_samples: int
    reduction: str

    @property
    def before(self) -> Diagnosis:
        """The diagnosis of the unscaled gradients."""
        return diagnose_gradients(self.gradients)

    @property
    def after(self) -> Diagnosis:
        """The diagnosis of the scaled gradients; the same as `before` if nothing was scaled."""
        return self.before if self.scaling is None else diagnose_gradients(self.scaling.after)

    def scaling_text(self) -> str | None:
        """Describe in one line what was scaled, with a warning if it was not needed; None if no fix was requested."""
        if self.scaling is None:
            return None
        fix = self.scaling.fix
        if fix == "none":
            return f"Gradient fix '{self.requested}': nothing to fix."
        text = f"Gradient fix '{fix}': gradient ratio {self.before.ratio:.1f} before, {self.after.ratio:.1f} after."
        if self.requested != "auto" and self.before.verdict == "normal":
            text += " Warning: the ratio was already under 100; a fix is not needed, and can do harm."
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return the analysis as a JSON-serialisable dict."""
        return {
            "seq_len": self.seq_len,
            "num_samples": self.num_samples,
            "reduction": self.reduction,
            "gradient_fix": self.requested,
            "ratio": {"before": self.before.ratio, "after": self.after.ratio},
            "verdict": {"before": self.before.verdict, "after": self.after.verdict},
            "scales": None if self.scaling is None else self.scaling.scales,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }
