"""The whole job on a loaded model: calibrate, choose, repair, cut, measure, and write the results if asked."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradprune.calibration.evidence import Evidence
from gradprune.calibration.gather import earlier_evidence, gather_evidence
from gradprune.calibration.kept import evidence_kept
from gradprune.calibration.resume import forget_calibration
from gradprune.checkpoint.atomic import atomic_directory
from gradprune.checkpoint.results import claimed_results, ratio_names, weight_bytes_on_disk
from gradprune.config import PruneConfig
from gradprune.data.agreement import check_same_inputs, check_same_options
from gradprune.data.samples import draw_samples
from gradprune.data.windows import check_context
from gradprune.errors import ConfigError, SelectionError
from gradprune.evaluation.generations import continuations, drawn_prompts, read_prompts
from gradprune.evaluation.perplexity import Perplexity, perplexity
from gradprune.evaluation.size import model_size
from gradprune.evaluation.speed import throughput
from gradprune.evaluation.tasks import TaskAccuracy, ask_tasks, read_tasks
from gradprune.export.serve import check_serve
from gradprune.memory import memory_advice
from gradprune.models import PrunableModel, describe
from gradprune.models.masks import GroupMasks
from gradprune.models.modes import evaluation_mode
from gradprune.models.placement import check_placement
from gradprune.ops.dispatch import select_ops
from gradprune.progress import QUIET, Clock
from gradprune.ranks import ALONE, Ranks
from gradprune.report.folder import summarize, write_results
from gradprune.report.html import write_curve_report
from gradprune.result import Measured, PruneResult
from gradprune.run import Run
from gradprune.scoring.choose import choose
from gradprune.scoring.selection import check_reachable
from gradprune.scoring.table import GroupTable, empty_table
from gradprune.search import search
from gradprune.shots import after_shots
from gradprune.surgery.cut import check_class, check_copyable, cut, sharing_copy
from gradprune.surgery.distillation import Distillation, distil_run, taught_samples
from gradprune.surgery.repair import REPAIRS, BlockRepair
from gradprune.target import at_target, ratio_of_size
from gradprune.vanishing.analysis import GradientAnalysis


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruneConfig | None = None,
    *,
    calibration: Tensor | None = None,
    evaluation: Tensor | None = None,
    console: Console = QUIET,
    ranks: Ranks = ALONE,
) -> PruneResult:
    """Prune a loaded causal LM.

    Args:
        model: left unchanged, its mode included, unless `config.in_place`: then the model itself is cut, which saves
            the memory of a copy of its prunable weights. It is run in evaluation mode.
        tokenizer: for text datasets, and saved with the model; may be None with `calibration` and `evaluation`.
        config: the options; None means the defaults. A results folder is written only if `config.output_name` is set.
        calibration: [tokens] int64 to draw calibration samples from, instead of `config.dataset`.
        evaluation: [tokens] int64 held-out tokens for perplexity, instead of `config.eval_dataset`.
        console: where progress is shown; nowhere by default.
        ranks: the processes that share the work, each with the same arguments, see `gradprune.ranks`; only the leading
            one writes.

    Raises:
        GradPruneError: an option, the data, the model or the requested ratio does not work; the message says what
            would.
    """
    config = _config_of_rank(config or PruneConfig(), ranks)
    check_class(model)
    if not config.in_place:
        check_copyable(model)
    clock = Clock(console)
    with claimed_results(config) as output, memory_advice(clock, config), evaluation_mode(model):
        run, earlier = _start(model, tokenizer, [config], calibration, evaluation, clock, ranks)
        evidence = gather_evidence(run, earlier)
        with evidence_kept(evidence, output), memory_advice(clock, config):
            result = _prune_at_ratio(run, evidence, _measure_dense(run))
            if output is not None:
                result = _write(run, result, tokenizer, output)
        forget_calibration(config)
        return result


def prune_ratios(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruneConfig,
    ratios: Sequence[float],
    *,
    console: Console = QUIET,
    ranks: Ranks = ALONE,
) -> list[PruneResult]:
    """Prune one model at several ratios from one calibration and one measurement of the dense model.

    Args:
        model: left unchanged, whatever `config.in_place` says.
        tokenizer, console, ranks: as for `prune`.
        config: the options; `pruning_ratio` is not read. If `output_name` is set, each ratio's results are written to a
            subfolder named after the ratio, beside `report.html`, which has the curve of perplexity against size.
        ratios: in ascending order, without duplicates.

    Raises:
        GradPruneError: as for `prune`; also if a target is set. A ratio that cannot be reached is refused before
            anything is calibrated.
    """
    config = _config_of_rank(config, ranks)
    if config.target is not None:
        raise ConfigError(
            f"{config.target}: {config.target_value} is given, and ratios too; leave out one or the other"
        )
    if not len(ratios) or list(ratios) != sorted(set(ratios)):
        raise ConfigError(f"ratios: {list(ratios)} is empty, or not in ascending order without duplicates")
    configs = [replace(config, pruning_ratio=ratio, in_place=False) for ratio in ratios]
    check_class(model)
    check_copyable(model)
    clock = Clock(console)
    with claimed_results(config, ratios) as output, memory_advice(clock, config), evaluation_mode(model):
        run, earlier = _start(model, tokenizer, configs, None, None, clock, ranks)
        evidence = gather_evidence(run, earlier)
        with (
            evidence_kept(evidence, output),
            _results_folder(config, output) as folder,
        ):
            dense = _measure_dense(run)
            results = []
            for each, name in zip(configs, ratio_names(ratios), strict=True):
                at_ratio = replace(run, config=each, clock=clock.copy())
                with memory_advice(at_ratio.clock, each):
                    result = _prune_at_ratio(at_ratio, evidence, dense)
                    if folder is not None and output is not None:
                        result = replace(_write(at_ratio, result, tokenizer, folder / name), output=output / name)
                results.append(result)
            if folder is not None:
                write_curve_report(folder / "report.html", [summarize(result) for result in results])
        forget_calibration(config)
        return results


def _results_folder(config: PruneConfig, output: Path | None) -> AbstractContextManager[Path | None]:
    """Context manager that yields a folder to write to, which becomes `output` at the end; None if `output` is None."""
    if output is None:
        return nullcontext()
    return atomic_directory(output, overwrite=config.overwrite, argument="output_name")


def _config_of_rank(config: PruneConfig, ranks: Ranks) -> PruneConfig:
    """Return the options for this rank: only the leading rank writes results and measures speed.

    Raises:
        ConfigError: an option works only with a single process.
    """
    if ranks.world == 1:
        return config
    for name in ("checkpoint_every", "resume"):
        if getattr(config, name):
            raise ConfigError(
                f"{name}: works with one process only, because each of the {ranks.world} ranks holds a part of an "
                "unfinished calibration"
            )
    return config if ranks.leads else replace(config, output_name=None, measure_speed=False)


def _write(run: Run, result: PruneResult, tokenizer: PreTrainedTokenizerBase | None, output: Path) -> PruneResult:
    """Write the result to `output`; return it with that folder and the size of its weight files."""
    with run.clock.stage("writing"):
        return write_results(result, tokenizer, output)


def _start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    configs: Sequence[PruneConfig],
    calibration: Tensor | None,
    evaluation: Tensor | None,
    clock: Clock,
    ranks: Ranks,
) -> tuple[Run, Evidence | None]:
    """Return the run of the first of `configs`, which differ only in ratio, and the evidence in `evidence_file`.

    The evidence is None if no file is given. Checks beforehand what would otherwise fail only after calibration.
    """
    check_same_options(ranks, configs)
    check_placement(model)
    view, config = describe(model, configs[0].kinds).with_groups(), configs[0]
    check_context(model.config, config.seq_len)
    groups = empty_table(view)
    for each in configs:
        _check_reachable(view, groups, each)
    check_serve(view, tokenizer, config.constraints)
    select_ops(config.backend, model.device.type, model.dtype)
    tasks = read_tasks(config.tasks.split(","), tokenizer) if config.tasks is not None else None
    prompts = read_prompts(config.prompts) if config.prompts is not None else None
    earlier = earlier_evidence(view, config)
    calibrated = 0 if earlier is None else earlier.windows_taken(config.dataset, config.seq_len, config.seed)
    with clock.stage("own_text") if sum(config.samples_written) else nullcontext():
        samples = draw_samples(
            model,
            tokenizer,
            config,
            calibration,
            evaluation,
            calibrated=calibrated,
            console=clock.console,
            ranks=ranks,
        )
    read = {
        "dataset": (samples.calibration, samples.held_out, samples.searched),
        "eval_dataset": (samples.evaluation,),
        "evidence_file": () if earlier is None else earlier.components.values(),
    }
    check_same_inputs(ranks, model, read)
    if tokenizer is None or not config.generations:
        prompts = []
    elif prompts is None:
        prompts = drawn_prompts(tokenizer, samples.evaluation)
    run = Run(
        view,
        config,
        samples,
        tokenizer=tokenizer,
        tasks=tasks,
        prompts=tuple(prompts),
        clock=clock,
        console=clock.console,
        ranks=ranks,
    )
    return run, earlier


def _check_reachable(view: PrunableModel, groups: GroupTable, config: PruneConfig) -> None:
    """Raise if the constraints rule out the ratio or the target size; a target speed can only be measured."""
    config.check_speed(streamed=view.residency is not None)
    if config.target_speedup is not None:
        return
    ratio = ratio_of_size(view, config)
    try:
        check_reachable(groups, config.pruning_ratio if ratio is None else ratio, view.parameters, config.constraints)
    except SelectionError as error:
        if config.target is None:
            raise
        raise SelectionError(f"{config.target}: {config.target_value} cannot be met; {error}") from error


def _prune_at_ratio(run: Run, evidence: Evidence, dense: Measured) -> PruneResult:
    """Choose the groups, repair and cut the model, and measure it."""
    found = None
    run = _at_target(run, evidence)
    if run.config.importance_method == "auto":
        with run.clock.stage("search"):
            found = search(run, evidence)
        run = _at_target(replace(run, config=run.config.with_part(found.winner.scoring)), evidence)
    scored = after_shots(run, evidence)
    if run.config.shots > 1:
        # The last shot's scores differ, so another ratio may be needed to meet the target.
        run = _at_target(run, scored)
    config = run.config
    with run.clock.stage("selection"):
        choice = choose(run.view, scored, config.scoring, config.constraints, config.pruning_ratio)
    pruned_model, repairs, distillation = _repair_and_cut(run, choice.masks)
    before, after = _measure_pruned(run, pruned_model, dense)
    return PruneResult(
        model=pruned_model,
        config=config,
        before=before,
        after=after,
        table=choice.table,
        pruned=choice.pruned,
        masks=choice.masks,
        gradients=_analysis(evidence, config.gradient_fix),
        evidence=evidence,
        repairs=repairs,
        search=found,
        seconds=run.clock.seconds,
        evaluation_overlap=run.samples.overlap,
        prompts=run.prompts,
        distillation=distillation,
    )


def _at_target(run: Run, evidence: Evidence) -> Run:
    if run.config.target is None:
        return run
    with run.clock.stage("target"):
        return at_target(run, evidence)


def _repair_and_cut(run: Run, masks: GroupMasks) -> tuple[PreTrainedModel, list[BlockRepair], Distillation | None]:
    """Return the cut model, the repair of each block and the outcome of distillation, if there was any."""
    # Weights that are re-solved or cut no longer share the dense model's memory.
    model = run.view.model if run.config.in_place else sharing_copy(run.view.model)
    with run.clock.stage("repair"):
        repaired = REPAIRS[run.config.repair](replace(run, view=describe(model, run.config.kinds)), masks)
        blocks, taught = repaired.blocks, taught_samples(run, repaired)
        # Free the residual streams of samples that distillation does not use.
        del repaired
    with run.clock.stage("surgery"):
        pruned = cut(model, masks, inplace=True)
    if taught is None:
        return pruned, blocks, None
    with run.clock.stage("distillation"):
        return pruned, blocks, distil_run(run, pruned, taught)


def _measure_dense(run: Run) -> Measured:
    with run.clock.stage("perplexity_before"):
        measured = _perplexity(run, run.view.model)
    size, base_model = model_size(run.view.model), run.config.base_model
    on_disk = weight_bytes_on_disk(base_model) if base_model else None
    tasks = _tasks(run, run.view.model, "tasks_before")
    return Measured(
        size.parameters, on_disk or size.bytes, measured, tasks=tasks, generations=_generations(run, run.view.model)
    )


def _measure_pruned(run: Run, pruned_model: PreTrainedModel, dense: Measured) -> tuple[Measured, Measured]:
    """Return the dense and the pruned model's measurements; speeds, if requested, are measured in alternation."""
    with run.clock.stage("perplexity_after"):
        size = model_size(pruned_model)
        measured = _perplexity(run, pruned_model)
    tasks = _tasks(run, pruned_model, "tasks_after")
    pruned = Measured(size.parameters, size.bytes, measured, tasks=tasks, generations=_generations(run, pruned_model))
    # A streamed model is not timed, because the result would be the speed of its disk.
    if not run.config.measure_speed or run.config.in_place or run.view.residency is not None:
        return dense, pruned
    with run.clock.stage("speed"):
        models = {"dense": run.view.model, "pruned": pruned_model}
        speed = throughput(models, seq_len=run.config.seq_len, seed=run.config.seed)
    return replace(dense, speed=speed["dense"]), replace(pruned, speed=speed["pruned"])


def _perplexity(run: Run, model: PreTrainedModel) -> Perplexity:
    config = run.config
    return perplexity(
        model,
        run.samples.evaluation,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        max_windows=config.eval_samples,
        console=run.console,
        ranks=run.ranks,
    )


def _tasks(run: Run, model: PreTrainedModel, stage: str) -> tuple[TaskAccuracy, ...]:
    """Measure the requested zero-shot accuracies, timed as `stage`."""
    config = run.config
    if run.tasks is None:
        return ()
    with run.clock.stage(stage):
        return ask_tasks(
            model,
            run.tasks,
            batch_size=config.batch_size,
            max_questions=config.task_questions,
            console=run.console,
        )


def _generations(run: Run, model: PreTrainedModel) -> tuple[str, ...]:
    if not run.prompts:
        return ()
    assert run.tokenizer is not None
    with run.clock.stage("generations"):
        return continuations(model, run.tokenizer, run.prompts)


def _analysis(evidence: Evidence, fix: str) -> GradientAnalysis:
    return GradientAnalysis(
        gradients=evidence.gradients,
        steps=evidence.steps,
        requested=fix,
        scaling=evidence.scaling(fix),
        seq_len=evidence.seq_len,
        num_samples=evidence.diagnosed_samples,
        reduction=evidence.reduction,
    )
