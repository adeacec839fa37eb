"""Calibration: run the samples through the engine and measure the priors; together they are the evidence."""

from dataclasses import replace

from rich.console import Console
from torch import Tensor

from gradprune.calibration.engine import ImportanceEngine
from gradprune.calibration.evidence import Evidence, fingerprint
from gradprune.calibration.priors import Priors, removal_priors, removal_steps, similarity_priors, taylor_priors
from gradprune.data.windows import batches
from gradprune.progress import progress
from gradprune.run import Run


def gather_evidence(run: Run) -> Evidence:
    """Calibrate, or read what an earlier run found; with the priors that the options need."""
    config = run.config
    with run.clock.stage("calibration"):
        if config.evidence_file is not None:
            evidence = Evidence.load(config.evidence_file, run.view.model)
        else:
            evidence = _calibrated(run)
    with run.clock.stage("priors"):
        needed = config.temperature > 0.0 or config.importance_method == "auto"
        if needed and config.prior not in evidence.priors:
            evidence = evidence.with_priors(config.prior, _priors(run))
    return evidence


def calibrate(engine: ImportanceEngine, windows: Tensor, batch_size: int, console: Console) -> None:
    """Run all calibration windows [N, T] through the engine, with progress."""
    with engine, progress(console, "Calibrating", len(windows), "samples") as advance:
        for batch in batches(windows, batch_size):
            engine.step(batch)
            advance(len(batch))


def _calibrated(run: Run) -> Evidence:
    config = run.config
    # One pass with gradients serves every method, and the diagnosis; "obs" takes more.
    engine = ImportanceEngine(
        run.view.model,
        "obs" if config.importance_method in ("obs", "auto") else "taylor",
        config.reduction,
        config.backend,
        config.use_gradient_checkpointing,
        config.gradient_fix,
    )
    calibrate(engine, run.samples.calibration, config.batch_size, run.console)
    evidence = replace(
        engine.evidence(steps=config.collect_batches),
        seed=config.seed,
        dataset=config.dataset,
        model=fingerprint(run.view.model),
    )
    return evidence.with_priors("taylor", taylor_priors(engine.gate_gradients()))


def _priors(run: Run) -> Priors:
    parts = list(batches(run.samples.calibration[: run.config.prior_samples], run.config.batch_size))
    if run.config.prior == "similarity":
        with progress(run.console, "Measuring priors", len(parts), "batches") as advance:
            return similarity_priors(run.view, parts, advance)
    with progress(run.console, "Measuring priors", removal_steps(run.view), "losses") as advance:
        return removal_priors(run.view, parts, advance)
