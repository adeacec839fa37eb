"""Calibration as a stage of a run: gather the evidence from the engine's steps and the measured priors."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from rich.console import Console
from torch import Tensor

from gradprune.calibration.engine import ImportanceEngine
from gradprune.calibration.evidence import Evidence
from gradprune.calibration.priors import Priors, removal_priors, removal_steps, similarity_priors, taylor_priors
from gradprune.calibration.resume import Resumable
from gradprune.config import CURVATURE_SAMPLES, OPTIONS, Method, PruneConfig
from gradprune.data.windows import batches
from gradprune.errors import ConfigError
from gradprune.models import PrunableModel
from gradprune.models.digest import model_digest
from gradprune.models.experts import WholeExperts
from gradprune.progress import progress
from gradprune.run import Run

logger = logging.getLogger(__name__)


def earlier_evidence(view: PrunableModel, config: PruneConfig) -> Evidence | None:
    """Load an earlier run's evidence from `evidence_file`; None if the option is not set.

    Raises:
        CheckpointError: see `Evidence.load`.
        ConfigError: the evidence was gathered with another reduction, or for other kinds of groups.
        GradPruneError: the evidence lacks the components of `importance_method`.
    """
    if config.evidence_file is None:
        return None
    evidence = Evidence.load(config.evidence_file, view.model)
    _check_reduction(config, evidence)
    _check_kinds(view, config, evidence)
    if config.importance_method != "auto":
        evidence.check_method(config.method)
    return evidence


def gather_evidence(run: Run, earlier: Evidence | None = None, *, bound: bool = True) -> Evidence:
    """Return the evidence of a calibration, or `earlier` if given, with the priors that the options need.

    Args:
        run: the run.
        earlier: an earlier run's evidence, which replaces the calibration; None: calibrate.
        bound: whether to store a digest of all the model's weights in new evidence; without it, a file of the evidence
            cannot be loaded.

    Raises:
        ConfigError: the prior "taylor" is needed, and the calibration did not compute the gradients of all samples.
    """
    config = run.config
    if earlier is not None:
        evidence = earlier
    else:
        with run.clock.stage("calibration"):
            engine = _calibrated(run)
        with run.clock.stage("importance"):
            evidence = _evidence(run, engine)
            if bound:
                evidence = replace(evidence, model=model_digest(run.view.model))
    if not config.uses_priors or _has_priors(evidence, config):
        return evidence
    if config.prior == "taylor":
        raise ConfigError(
            "prior: 'taylor' is not in evidence_file, because its calibration did not compute the gradients of all "
            "samples; calibrate again with this prior, or with evidence 'all'"
        )
    with run.clock.stage("priors"):
        return evidence.with_priors(config.prior, _priors(run))


def _has_priors(evidence: Evidence, config: PruneConfig) -> bool:
    """Whether the evidence has the priors of the requested kind, measured on the requested number of samples."""
    found = evidence.priors.get(config.prior)
    return found is not None and found.samples in (None, min(config.prior_samples, config.num_samples))


def calibrate(
    engine: ImportanceEngine,
    windows: Tensor,
    batch_size: int,
    console: Console,
    *,
    start: int = 0,
    after: Callable[[int], None] = lambda done: None,
) -> None:
    """Run all calibration windows through the engine, and show progress.

    Whole batches are divided among the engine's ranks, so that each batch is computed as a single process would
    compute it.

    Args:
        engine: the engine, not yet open.
        windows: [N, T] int64, the samples.
        batch_size: samples per batch.
        console: where progress is shown.
        start: the number of samples that the engine has already processed.
        after: called after each wave of batches with the number of samples that this rank's engine has processed.
    """
    done, ranks = start, engine.ranks
    parts = list(batches(windows[start:], batch_size))
    own = ranks.share(parts)
    if parts and len(parts) < ranks.world and ranks.leads:
        logger.warning(
            "%d of %d ranks have no samples to calibrate on: %d batches; a smaller --batch_size makes more",
            ranks.world - len(parts), ranks.world, len(parts),
        )  # fmt: skip
    with engine, progress(console, "Calibrating", sum(map(len, own)), "samples") as advance:
        for wave in engine.waves(own):
            engine.steps(wave)
            samples = sum(map(len, wave))
            done += samples
            after(done)
            advance(samples)
    engine.join(parts)


def _calibrated(run: Run) -> ImportanceEngine:
    config = run.config
    method, everything = _engine_method(config)
    asked = config.importance_method
    if everything and asked != "obs" and any(isinstance(block, WholeExperts) for block in run.view.blocks):
        # Collect for all methods except "obs", which cannot score whole experts. If "obs" itself is requested, the
        # engine refuses it.
        method = "taylor_2nd"
    engine = ImportanceEngine(
        run.view.model,
        method,
        config.reduction,
        config.backend,
        use_gradient_checkpointing=config.use_gradient_checkpointing,
        gradient_fix=config.gradient_fix,
        weight_gradient_steps=None if everything else config.collect_batches,
        ranks=run.ranks,
        kinds=config.kinds,
    )
    stepped, read = _stepped_and_read(run, method)
    state = Resumable(run, engine, stepped)
    start = state.restore(resume=config.resume)
    calibrate(engine, stepped, config.batch_size, run.console, start=start, after=state.save)
    if len(read):
        engine.read(list(batches(read, config.batch_size)))
    return engine


def _evidence(run: Run, engine: ImportanceEngine) -> Evidence:
    """The evidence from the engine's sums and, for "obs", from one more pass over the samples."""
    config = run.config
    with _progress_of_obs(run, engine) as advance:
        found = engine.evidence(steps=config.collect_batches, advance=advance)
    evidence = replace(
        found,
        seed=config.seed,
        dataset=config.dataset,
        own_text=config.samples_written[0] / config.num_samples,
    )
    gates = engine.gate_gradients()
    return evidence.with_priors("taylor", taylor_priors(gates)) if gates else evidence


def _engine_method(config: PruneConfig) -> tuple[Method, bool]:
    """The engine's method, and whether every step collects what every method needs."""
    if config.evidence == "all" or config.importance_method == "auto":
        return "obs", True
    method = config.method
    # The taylor prior comes from the backward pass, which these methods do not need.
    if config.prior == "taylor" and config.temperature > 0.0 and method in ("magnitude", "wanda", "reap"):
        return "group_fisher", False
    return method, False


def _stepped_and_read(run: Run, method: Method) -> tuple[Tensor, Tensor]:
    """The calibration samples to run steps on, and those that are only given to `engine.read`; [N, T] each."""
    config, samples = run.config, run.samples.calibration
    if method == "magnitude":
        # Only the diagnosis of the layers' gradients needs samples.
        return samples[: config.collect_batches * config.batch_size], samples[:0]
    # With experts all samples are needed, because an expert sees only a few of their tokens.
    if config.curvatures_alone and not run.view.has_experts:
        return samples[:CURVATURE_SAMPLES], samples[CURVATURE_SAMPLES:]
    return samples, samples[:0]


def _progress_of_obs(run: Run, engine: ImportanceEngine) -> AbstractContextManager[Callable[[], None]]:
    if engine.method != "obs":
        return nullcontext(lambda: None)
    return progress(run.console, "Finding removal paths", len(run.view.blocks), "blocks")


def _check_reduction(config: PruneConfig, evidence: Evidence) -> None:
    """Refuse a requested reduction that is not the evidence's; the default reduction is accepted with any evidence."""
    if config.reduction not in (OPTIONS["reduction"].default, evidence.reduction):
        raise ConfigError(
            f"reduction: '{config.reduction}' needs another calibration; that of evidence_file "
            f"'{config.evidence_file}' had '{evidence.reduction}'"
        )


def _check_kinds(view: PrunableModel, config: PruneConfig, evidence: Evidence) -> None:
    """Refuse evidence about other groups than those to be pruned."""
    if list(evidence.blocks) != [block.key for block in view.blocks]:
        scored = ", ".join(dict.fromkeys(key.kind for key in evidence.blocks))
        raise ConfigError(
            f"prune_kinds: evidence_file '{config.evidence_file}' scored {scored}; give these, or calibrate again"
        )


def _priors(run: Run) -> Priors:
    parts = list(batches(run.samples.calibration[: run.config.prior_samples], run.config.batch_size))
    if run.config.prior == "similarity":
        with progress(run.console, "Measuring priors", len(parts), "batches") as advance:
            return similarity_priors(run.view, parts, advance)
    with progress(run.console, "Measuring priors", removal_steps(run.view), "losses") as advance:
        return removal_priors(run.view, parts, advance, run.ranks)
