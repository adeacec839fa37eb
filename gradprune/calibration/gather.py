"""Calibration: run the samples through the engine and the priors, and gather the evidence."""

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from gradprune.calibration.engine import ImportanceEngine
from gradprune.calibration.evidence import Evidence
from gradprune.calibration.priors import Priors, removal_priors, removal_steps, similarity_priors, taylor_priors
from gradprune.config import PruneConfig
from gradprune.data.samples import Samples
from gradprune.data.windows import batches
from gradprune.models import PrunableModel
from gradprune.progress import QUIET, Clock, progress


def gather_evidence(
    model: PreTrainedModel,
    view: PrunableModel,
    samples: Samples,
    config: PruneConfig,
    clock: "Clock | None" = None,
    console: Console = QUIET,
) -> Evidence:
    """Calibrate, or read what an earlier run found; with the priors that `config` needs."""
    clock = clock or Clock()
    with clock.stage("calibration"):
        if config.evidence_file is not None:
            evidence = Evidence.load(config.evidence_file, model)
        else:
            engine = _engine(model, config)
            calibrate(engine, samples.calibration, config.batch_size, console)
            evidence = Evidence.of(engine, model, config).with_priors("taylor", taylor_priors(engine))
    with clock.stage("priors"):
        needed = config.temperature > 0.0 or config.importance_method == "auto"
        if needed and config.prior not in evidence.priors:
            priors = _priors(model, view, samples.calibration[: config.prior_samples], config, console)
            evidence = evidence.with_priors(config.prior, priors)
    return evidence


def calibrate(engine: ImportanceEngine, windows: Tensor, batch_size: int, console: Console) -> None:
    """Run all calibration windows [N, T] through the engine, with progress."""
    with engine, progress(console, "Calibrating", len(windows), "samples") as advance:
        for batch in batches(windows, batch_size):
            engine.step(batch)
            advance(len(batch))


def _engine(model: PreTrainedModel, config: PruneConfig) -> ImportanceEngine:
    """One pass with gradients serves every method, and the diagnosis."""
    return ImportanceEngine(
        model,
        "taylor",
        config.reduction,
        config.backend,
        config.use_gradient_checkpointing,
        # Finished vectors can be repaired at any time, batches only as they come.
        config.gradient_fix if config.reduction == "batch" else "none",
    )


def _priors(
    model: PreTrainedModel, view: PrunableModel, samples: Tensor, config: PruneConfig, console: Console
) -> Priors:
    parts = list(batches(samples, config.batch_size))
    if config.prior == "similarity":
        with progress(console, "Measuring priors", len(parts), "batches") as advance:
            return similarity_priors(model, view, parts, advance)
    with progress(console, "Measuring priors", removal_steps(view), "losses") as advance:
        return removal_priors(model, view, parts, advance)
