"""Diagnosis of vanishing gradients: the ratio of layer means, the verdict and a recommendation."""

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal

from gradprune.vanishing.statistics import LayerGradients, gradient_ratio

Verdict = Literal["normal", "mild", "severe"]

_ADVICE: dict[Verdict, str] = {
    "normal": "no fix is needed",
    "mild": "scale the layers' gradients adaptively",
    "severe": "scale the layers' gradients adaptively, then weight them by depth",
}


@dataclass(frozen=True)
class Diagnosis:
    """The gradient statistics of a model's layers, with a verdict.

    ratio: largest layer mean of |g| divided by the smallest; infinite if a layer's mean is 0.
    verdict: "normal" below 100, "mild" from 100 to 1000, "severe" above.
    vanishing: indices of the layers whose mean is less than 1/100 of the largest.
    """

    layers: list[LayerGradients]
    ratio: float
    verdict: Verdict
    vanishing: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as a JSON-serialisable dict, as `analysis/gradients.json` contains it."""
        return {**asdict(self), "recommendation": self.recommendation}

    @property
    def recommendation(self) -> str:
        """What to do in view of the verdict, in a few words."""
        return _ADVICE[self.verdict]

    def mark(self, layer: LayerGradients) -> str:
        """Name the layer's problem: "frozen", "vanishing (zero)" or "vanishing"; an empty string if it has none."""
        if layer.mean == 0.0:
            return "frozen" if layer.frozen else "vanishing (zero)"
        return "vanishing" if layer.layer in self.vanishing else ""

    def marked_layers(self) -> str:
        """List the marked layers as ranges, such as "vanishing 0-3, 7; frozen 9"; "none" if no layer is marked."""
        by_mark: dict[str, list[int]] = {}
        for layer in self.layers:
            if mark := self.mark(layer):
                by_mark.setdefault(mark, []).append(layer.layer)
        return "; ".join(f"{mark} {_ranges(indices)}" for mark, indices in by_mark.items()) or "none"

    def verdict_text(self) -> str:
        """Return one line with the ratio, the verdict, the recommendation and the layers without any gradient."""
        text = f"Gradient ratio {self.ratio:.1f}: {self.verdict}; {self.recommendation}."
        dead = [str(layer.layer) for layer in self.layers if layer.mean == 0.0]
        return text + (f" Without any gradient: layer {', '.join(dead)}." if dead else "")


def diagnose_gradients(layers: list[LayerGradients]) -> Diagnosis:
    """Diagnose the gradient statistics of a model's decoder layers (at least one)."""
    ratio = gradient_ratio(layers)
    largest = max(layer.mean for layer in layers)
    return Diagnosis(
        layers=layers,
        ratio=ratio,
        verdict=verdict_of(ratio),
        vanishing=[layer.layer for layer in layers if layer.mean * 100.0 < largest],
    )


def verdict_of(ratio: float) -> Verdict:
    """Classify a ratio: "normal" below 100, "mild" up to and including 1000, "severe" above."""
    if ratio < 100.0:
        return "normal"
    return "mild" if ratio <= 1000.0 else "severe"


def _ranges(indices: list[int]) -> str:
    """Format ascending indices, consecutive runs as ranges: "0-3, 7"."""
    runs = [[index for _, index in run] for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def stablest(diagnoses: dict[int, Diagnosis]) -> int:
    """Return the sequence length with the smallest ratio; ties are broken by the shorter length."""
    return min(diagnoses, key=lambda seq_len: (diagnoses[seq_len].ratio, seq_len))
