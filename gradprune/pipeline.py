"""The whole job on a loaded model: calibrate, score, select, cut, repair, measure, and write the results if asked."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradprune.calibration.evidence import Evidence
from gradprune.calibration.gather import gather_evidence
from gradprune.checkpoint.atomic import atomic_directory, check_free
from gradprune.config import PruneConfig
from gradprune.data.samples import Samples, draw_samples
from gradprune.data.windows import batches, check_context
from gradprune.evaluation.perplexity import Perplexity, perplexity
from gradprune.evaluation.size import model_size, weight_bytes_on_disk
from gradprune.evaluation.speed import throughput
from gradprune.models import PrunableModel, describe
from gradprune.models.masks import GroupMasks
from gradprune.ops.dispatch import select_ops
from gradprune.progress import QUIET, Clock, progress
from gradprune.report.folder import summarize, write_results
from gradprune.report.html import write_curve_report
from gradprune.result import Measured, PruneResult
from gradprune.scoring.scoring import score_groups
from gradprune.scoring.selection import check_reachable, select
from gradprune.scoring.table import group_costs
from gradprune.search import SearchResult, search
from gradprune.surgery.cut import cut
from gradprune.surgery.least_squares import BlockRepair, least_squares, repair_steps
from gradprune.surgery.masking import output_weights_restored
from gradprune.vanishing.analysis import GradientAnalysis


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruneConfig | None = None,
    *,
    calibration: Tensor | None = None,
    evaluation: Tensor | None = None,
    console: Console = QUIET,
) -> PruneResult:
    """Prune a loaded causal LM.

    Args:
        model: stays as it is, unless `config.in_place`: then it is cut itself, to save memory.
        tokenizer: for text datasets, and saved with the model; may be None with `calibration` and `evaluation`.
        config: the options; a results folder is written only where `config.output_name` is set.
        calibration: [tokens] int64 to draw calibration samples from, instead of `config.dataset`.
        evaluation: [tokens] int64 held-out tokens for perplexity, instead of `config.eval_dataset`.
        console: where progress is shown; nowhere by default.

    Raises:
        GradPruneError: an option, the data, the model or the requested ratio does not work; says what would.
    """
    config = config or PruneConfig()
    output = Path(config.output_dir) / config.output_name if config.output_name else None
    if output is not None:
        check_free(output, overwrite=config.overwrite, argument="output_name")
    clock = Clock()
    view = describe(model)
    parameters = model_size(model).parameters
    kept_kv_groups = _check_reachable(model, view, parameters, config)
    select_ops(config.backend, model.device.type)
    samples = draw_samples(model, tokenizer, config, calibration, evaluation)

    # Calibration comes first: where weights are broken, it names the layer, which perplexity cannot.
    evidence = gather_evidence(model, view, samples, config, clock, console)
    found = None
    if config.importance_method == "auto":
        found = _search(model, view, evidence, config, kept_kv_groups, samples, clock, console)
        config = config.with_part(found.winner.scoring)
    with clock.stage("scoring"):
        table = score_groups(view, evidence, config.scoring)
    before = _measure_before(model, samples, config, clock, console)
    with clock.stage("selection"):
        pruned = select(table, config.pruning_ratio, parameters, config.constraints, kept_kv_groups)
        masks = table.masks(pruned)
    cut_model, repairs = _cut_and_repair(model, view, masks, samples, config, clock, console)
    before, after = _measure_after(model, cut_model, before, samples, config, clock, console)
    gradients = _analysis(evidence, config, len(view.layers))
    result = PruneResult(
        cut_model, config, before, after, table, pruned, masks, gradients, evidence, repairs, found, clock.seconds
    )
    return result if output is None else write_results(result, tokenizer, output)


def prune_ratios(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruneConfig,
    ratios: Sequence[float],
    *,
    console: Console = QUIET,
) -> list[PruneResult]:
    """Prune one model at several ratios from one calibration.

    Args:
        model: stays as it is, whatever `config.in_place` says.
        tokenizer, console: as for `prune`.
        config: with `output_name`; each ratio's results go to a folder of its name in that folder, beside
            `report.html`, which has the curve of perplexity against size. `pruning_ratio` is not read.
        ratios: ascending, each once.

    Raises:
        GradPruneError: as `prune`, and before anything is calibrated where one of the ratios cannot be reached.
    """
    assert config.output_name is not None
    output = Path(config.output_dir) / config.output_name
    check_free(output, overwrite=config.overwrite, argument="output_name")
    configs = [replace(config, pruning_ratio=ratio, in_place=False) for ratio in ratios]
    view, parameters = describe(model), model_size(model).parameters
    for each in configs:
        _check_reachable(model, view, parameters, each)
    results = []
    with atomic_directory(output, overwrite=config.overwrite, argument="output_name") as folder:
        evidence_file = config.evidence_file
        for each in configs:
            name = f"{each.pruning_ratio:g}"
            result = prune(
                model, tokenizer, replace(each, output_name=None, evidence_file=evidence_file), console=console
            )
            recorded = replace(result.config, output_name=config.output_name, evidence_file=config.evidence_file)
            result = write_results(replace(result, config=recorded), tokenizer, folder / name)
            # The first run calibrates for all.
            evidence_file = evidence_file or str(folder / name / "analysis" / "scores.safetensors")
            results.append(replace(result, output=output / name))
        write_curve_report(folder / "report.html", [summarize(result) for result in results])
    return results


def _check_reachable(
    model: PreTrainedModel, view: PrunableModel, parameters: int, config: PruneConfig
) -> frozenset[int] | None:
    """The `kept_kv_groups` of the selection; raises at once what could not be done after calibration."""
    check_context(model.config, config.seq_len)
    kept_kv_groups = _kept_kv_groups(model, view) if config.uniform else None
    check_reachable(group_costs(view), config.pruning_ratio, parameters, config.constraints, kept_kv_groups)
    return kept_kv_groups


def _search(
    model: PreTrainedModel,
    view: PrunableModel,
    evidence: Evidence,
    config: PruneConfig,
    kept_kv_groups: frozenset[int] | None,
    samples: Samples,
    clock: Clock,
    console: Console,
) -> SearchResult:
    parameters = model_size(model).parameters
    # The number of steps is an upper bound: selections that come twice are tried once.
    with clock.stage("search"), progress(console, "Searching", 1, "trials") as advance:
        return search(
            model,
            view,
            evidence,
            config,
            kept_kv_groups,
            parameters,
            samples.calibration,
            samples.held_out,
            lambda done, total: advance(1, total=total),
        )


def _measure_before(
    model: PreTrainedModel, samples: Samples, config: PruneConfig, clock: Clock, console: Console
) -> Measured:
    with clock.stage("perplexity_before"):
        perplexity_before = _perplexity(model, samples.evaluation, config, console)
    size = model_size(model)
    disk = weight_bytes_on_disk(config.base_model) if config.base_model else None
    return Measured(size.parameters, disk or size.bytes, perplexity_before)


def _cut_and_repair(
    model: PreTrainedModel,
    view: PrunableModel,
    masks: GroupMasks,
    samples: Samples,
    config: PruneConfig,
    clock: Clock,
    console: Console,
) -> tuple[PreTrainedModel, list[BlockRepair]]:
    """The cut model, and what least squares did to its blocks. `model` stays as it was unless it is cut in place."""
    repairs: list[BlockRepair] = []
    # The weights are re-solved in the whole model, and then cut; the cut ones no longer share its memory.
    with nullcontext() if config.in_place else output_weights_restored(view, masks):
        if config.repair == "least_squares":
            with clock.stage("repair"), progress(console, "Repairing", repair_steps(view), "blocks") as advance:
                parts = [list(batches(part, config.batch_size)) for part in (samples.calibration, samples.held_out)]
                repairs = least_squares(model, view, masks, *parts, advance=advance)
        with clock.stage("surgery"):
            cut_model = cut(model, masks, inplace=config.in_place)
    return cut_model, repairs


def _measure_after(
    model: PreTrainedModel,
    cut_model: PreTrainedModel,
    before: Measured,
    samples: Samples,
    config: PruneConfig,
    clock: Clock,
    console: Console,
) -> tuple[Measured, Measured]:
    with clock.stage("perplexity_after"):
        size = model_size(cut_model)
        after = Measured(size.parameters, size.bytes, _perplexity(cut_model, samples.evaluation, config, console))
    if not config.measure_speed:
        return before, after
    with clock.stage("speed"):
        speed = throughput({"dense": model, "pruned": cut_model}, seq_len=config.seq_len, seed=config.seed)
    return replace(before, speed=speed["dense"]), replace(after, speed=speed["pruned"])


def _analysis(evidence: Evidence, config: PruneConfig, layers: int) -> GradientAnalysis:
    return GradientAnalysis(
        gradients=evidence.gradients,
        steps=evidence.steps,
        requested=config.gradient_fix,
        repair=evidence.repaired(config.gradient_fix, layers),
        seq_len=evidence.seq_len,
        num_samples=evidence.num_samples,
        reduction=evidence.reduction,
    )


def _perplexity(model: PreTrainedModel, tokens: Tensor, config: PruneConfig, console: Console) -> Perplexity:
    return perplexity(
        model,
        tokens,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        max_windows=config.eval_samples,
        console=console,
    )


def _kept_kv_groups(model: PreTrainedModel, view: PrunableModel) -> frozenset[int] | None:
    """The numbers of KV groups that a plain checkpoint of this architecture can state; None for any."""
    first = view.attention[0]
    if not view.architecture.heads_divide_hidden or first is None:
        return None
    hidden = model.config.hidden_size
    return frozenset(n for n in range(1, first.groups + 1) if hidden % (n * first.heads_per_group) == 0)
