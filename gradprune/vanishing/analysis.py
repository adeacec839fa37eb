"""`GradientAnalysis`: a pruning run's gradients before and after scaling, for the terminal and for files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradprune.report.visualizer import GradientVisualizer
from gradprune.vanishing.diagnosis import Diagnosis, diagnose_gradients
from gradprune.vanishing.scaling import GradientRepair
from gradprune.vanishing.statistics import LayerGradients


@dataclass(frozen=True)
class GradientAnalysis:
    """What calibration saw of the layers' gradients.

    gradients: their statistics over all samples, before any scaling. steps: those of the first batches.
    requested, repair: the fix asked for, and what it did; None if there was none.
    seq_len, num_samples, reduction: of the calibration.
    """

    gradients: list[LayerGradients]
    steps: list[list[LayerGradients]]
    requested: str
    repair: GradientRepair | None
    seq_len: int
    num_samples: int
    reduction: str

    @property
    def before(self) -> Diagnosis:
        """The diagnosis of the gradients as they are."""
        return diagnose_gradients(self.gradients)

    @property
    def after(self) -> Diagnosis:
        """The diagnosis of the scaled gradients; that of `before` if nothing was scaled."""
        return self.before if self.repair is None else diagnose_gradients(self.repair.after)

    def repair_text(self) -> str | None:
        """One line on what was scaled, with a warning if it was not needed; None if no fix was asked for."""
        if self.repair is None:
            return None
        fix = self.repair.fix
        if fix == "none":
            return f"Repair '{self.requested}': nothing to repair."
        text = f"Repair '{fix}': gradient ratio {self.before.ratio:.1f} before, {self.after.ratio:.1f} after."
        if self.requested != "auto" and self.before.verdict == "normal":
            text += " Warning: the ratio was under 100 already; a repair is not needed, and can harm."
        return text

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "seq_len": self.seq_len,
            "num_samples": self.num_samples,
            "reduction": self.reduction,
            "gradient_fix": self.requested,
            "ratio": {"before": self.before.ratio, "after": self.after.ratio},
            "verdict": {"before": self.before.verdict, "after": self.after.verdict},
            "scales": None if self.repair is None else self.repair.scales,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }

    def write_plots(self, folder: Path) -> list[Path]:
        """The five files of `GradientVisualizer`, from the first batches."""
        visualizer = GradientVisualizer(folder)
        for index, step in enumerate(self.steps):
            visualizer.collect_statistics(step, f"batch_{index}")
        return visualizer.write_all()
