"""The whole job on a loaded model: calibrate, score, select, cut, repair, measure, and write the results if asked."""

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import gradprune
from gradprune.calibration import batches, check_context, load_tokens, sample_windows, split_held_out
from gradprune.checkpoint import atomic_directory, check_free, save_checkpoint
from gradprune.config import PruneConfig
from gradprune.distribution import LayerPruning, pruning_distribution, pruning_warning, to_json
from gradprune.errors import CalibrationError
from gradprune.evaluate import Perplexity, Throughput, model_size, perplexity, throughput, weight_bytes_on_disk
from gradprune.evidence import Evidence
from gradprune.gradients.analysis import GradientAnalysis
from gradprune.groups import GroupTable, group_costs
from gradprune.hgsp import Priors, removal_priors, removal_steps, similarity_priors, taylor_priors
from gradprune.importance import ImportanceEngine
from gradprune.importance.ops import select_ops
from gradprune.masking import output_weights_restored
from gradprune.masks import GroupMasks
from gradprune.models import PrunableModel, describe
from gradprune.progress import progress
from gradprune.repair import BlockRepair, least_squares, repair_steps
from gradprune.report import write_curve_report, write_json, write_report
from gradprune.scoring import Scoring, score_groups
from gradprune.search import SearchResult, search, search_to_dict, with_scoring
from gradprune.selection import Constraints, check_reachable, select
from gradprune.surgery import cut

QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Measured:
    """A model before or after pruning.

    parameters: tied ones counted once. bytes_on_disk: of the weights' files, of the tensors where there is none.
    """

    parameters: int
    bytes_on_disk: int
    perplexity: Perplexity
    speed: Throughput | None = None


@dataclass(frozen=True)
class PruneResult:
    """What a pruning run gives.

    model: the pruned model. before, after: what was measured.
    table, pruned: every group with its score, and whether it went.
    masks: what each block kept. gradients: the layers' gradients before and after their repair.
    evidence: what calibration found, to score again without it. repairs: what least squares did to each block.
    search: what was tried where importance_method was "auto"; `config` then has what it chose.
    seconds: wall time by stage. output: the results folder, None where nothing was written.
    """

    model: PreTrainedModel
    config: PruneConfig
    before: Measured
    after: Measured
    table: GroupTable
    pruned: NDArray[np.bool_]
    masks: GroupMasks
    gradients: GradientAnalysis
    evidence: Evidence
    repairs: list[BlockRepair] = field(default_factory=list)
    search: SearchResult | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    output: Path | None = None

    @property
    def distribution(self) -> list[LayerPruning]:
        """What each layer lost."""
        return pruning_distribution(self.masks)

    @property
    def warning(self) -> str | None:
        """Names over-pruned blocks, and what to try next."""
        return pruning_warning(self.distribution, self.config)


@dataclass(frozen=True)
class Samples:
    """Token ids of a run; none of the three shares a token with another.

    calibration: [num_samples, seq_len]. held_out: [at most held_out_samples, seq_len], none where nothing is chosen
        on them.
    evaluation: [tokens].
    """

    calibration: Tensor
    held_out: Tensor
    evaluation: Tensor


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
        model: stays as it is, unless `config.measure_speed` is False: then it is cut in place, to save memory.
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
    constraints = _check_reachable(model, view, parameters, config)
    select_ops(config.backend, model.device.type)
    samples = draw_samples(model, tokenizer, config, calibration, evaluation)

    # Calibration comes first: where weights are broken, it names the layer, which perplexity cannot.
    evidence = gather_evidence(model, view, samples, config, clock, console)
    found = None
    if config.importance_method == "auto":
        found = _search(model, view, evidence, config, constraints, samples, clock, console)
        config = with_scoring(config, found.winner.scoring)
    with clock.stage("scoring"):
        table = score_groups(view, evidence, Scoring.of(config))
    before = _measure_before(model, samples, config, clock, console)
    with clock.stage("selection"):
        pruned = select(table, config.pruning_ratio, parameters, constraints)
        masks = table.masks(pruned)
    cut_model, repairs = _cut_and_repair(model, view, masks, samples, config, clock, console)
    before, after = _measure_after(model, cut_model, before, samples, config, clock, console)
    gradients = _analysis(evidence, config, len(view.layers))
    result = PruneResult(
        cut_model, config, before, after, table, pruned, masks, gradients, evidence, repairs, found, clock.seconds
    )
    return result if output is None else _write(result, tokenizer, output)


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
        model: stays as it is, whatever `config.measure_speed` says.
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
    configs = [replace(config, pruning_ratio=ratio, measure_speed=True) for ratio in ratios]
    view, parameters = describe(model), model_size(model).parameters
    for each in configs:
        _check_reachable(model, view, parameters, each)
    results = []
    with atomic_directory(output, overwrite=config.overwrite, argument="output_name") as folder:
        scores = config.scores
        for each in configs:
            name = f"{each.pruning_ratio:g}"
            result = prune(model, tokenizer, replace(each, output_name=None, scores=scores), console=console)
            recorded = replace(result.config, output_name=config.output_name, scores=config.scores)
            result = _write(replace(result, config=recorded), tokenizer, folder / name)
            # The first run calibrates for all.
            scores = scores or str(folder / name / "analysis" / "scores.safetensors")
            results.append(replace(result, output=output / name))
        write_curve_report(folder / "report.html", [summarize(result) for result in results])
    return results


def draw_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruneConfig,
    calibration: Tensor | None = None,
    evaluation: Tensor | None = None,
) -> Samples:
    """The samples of a run, as given or from the datasets of `config`."""
    calibration, evaluation = _tokens(tokenizer, config, calibration, evaluation, model.config.vocab_size)
    # As many held-out samples as the text has left over.
    spare = max(0, len(calibration) // config.seq_len - config.num_samples)
    chooses = config.repair != "none" or config.importance_method == "auto"
    held_out = min(config.held_out_samples, spare) if chooses else 0
    if config.importance_method == "auto" and not held_out:
        raise CalibrationError(
            f"num_samples: {config.num_samples} samples leave no text to search on; give more text, or fewer samples"
        )
    windows = sample_windows(
        calibration, num_samples=config.num_samples + held_out, seq_len=config.seq_len, seed=config.seed
    )
    return Samples(windows[: config.num_samples], windows[config.num_samples :], evaluation)


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
        if config.scores is not None:
            evidence = Evidence.load(config.scores, model)
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


def summarize(result: PruneResult) -> dict[str, Any]:
    """The content of `analysis/summary.json`."""
    counts = zip(result.masks.attention, result.masks.mlp, strict=True)
    pairs = {
        "parameters": (result.before.parameters, result.after.parameters),
        "perplexity": (result.before.perplexity.value, result.after.perplexity.value),
        "bytes_on_disk": (result.before.bytes_on_disk, result.after.bytes_on_disk),
        "tokens_per_second": tuple(m.speed.p50 if m.speed else None for m in (result.before, result.after)),
    }
    return {
        **{name: {"before": before, "after": after} for name, (before, after) in pairs.items()},
        "pruning_ratio": {
            "requested": result.config.pruning_ratio,
            "achieved": 1.0 - result.after.parameters / result.before.parameters,
        },
        "evaluation_tokens": result.before.perplexity.tokens,
        "layers": [
            {
                "layer": layer,
                "attention": {"groups": len(attention), "kept": int(attention.sum())},
                "mlp": {"channels": len(mlp), "kept": int(mlp.sum())},
            }
            for layer, (attention, mlp) in enumerate(counts)
        ],
        "repair": [asdict(repair) for repair in result.repairs],
    }


class Clock:
    """Wall seconds by stage, in the order the stages ran."""

    def __init__(self) -> None:
        """No stage yet."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body as stage `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 4)


def _check_reachable(model: PreTrainedModel, view: PrunableModel, parameters: int, config: PruneConfig) -> Constraints:
    """The selection's constraints; raises at once what could not be done after calibration."""
    check_context(model.config, config.seq_len)
    constraints = Constraints.of(config, _kept_kv_groups(model, view) if config.uniform else None)
    check_reachable(group_costs(view), config.pruning_ratio, parameters, constraints)
    return constraints


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


def _search(
    model: PreTrainedModel,
    view: PrunableModel,
    evidence: Evidence,
    config: PruneConfig,
    constraints: Constraints,
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
            constraints,
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
    """The cut model, and what least squares did to its blocks. `model` stays as it was where speed is measured."""
    inplace = not config.measure_speed
    repairs: list[BlockRepair] = []
    # The weights are re-solved in the whole model, and then cut; the cut ones no longer share its memory.
    with nullcontext() if inplace else output_weights_restored(view, masks):
        if config.repair == "least_squares":
            with clock.stage("repair"), progress(console, "Repairing", repair_steps(view), "blocks") as advance:
                parts = [list(batches(part, config.batch_size)) for part in (samples.calibration, samples.held_out)]
                repairs = least_squares(model, view, masks, *parts, advance=advance)
        with clock.stage("surgery"):
            cut_model = cut(model, masks, inplace=inplace)
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


def _priors(
    model: PreTrainedModel, view: PrunableModel, samples: Tensor, config: PruneConfig, console: Console
) -> Priors:
    parts = list(batches(samples, config.batch_size))
    if config.prior == "similarity":
        with progress(console, "Measuring priors", len(parts), "batches") as advance:
            return similarity_priors(model, view, parts, advance)
    with progress(console, "Measuring priors", removal_steps(view), "losses") as advance:
        return removal_priors(model, view, parts, advance)


def _tokens(
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruneConfig,
    calibration: Tensor | None,
    evaluation: Tensor | None,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """Calibration and held-out tokens, as given or from the datasets; the two never overlap."""
    held_out_in_file = evaluation is None and config.eval_dataset is None
    if evaluation is None and (config.eval_dataset is not None or (calibration is None and config.dataset is None)):
        evaluation = load_tokens(config.eval_dataset, tokenizer, split="evaluation", vocab_size=vocab_size)
        held_out_in_file = False
    if calibration is None:
        calibration = load_tokens(config.dataset, tokenizer, vocab_size=vocab_size)
    if held_out_in_file or evaluation is None:
        return split_held_out(calibration, config.seq_len)
    return calibration, evaluation


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


def _write(result: PruneResult, tokenizer: PreTrainedTokenizerBase | None, output: Path) -> PruneResult:
    """Write the results folder: all of it or, if interrupted, nothing."""
    with atomic_directory(output, overwrite=result.config.overwrite, argument="output_name") as folder:
        save_checkpoint(result.model, tokenizer, folder / "model")
        on_disk = weight_bytes_on_disk(folder / "model")
        result = replace(
            result, after=replace(result.after, bytes_on_disk=on_disk or result.after.bytes_on_disk), output=output
        )
        analysis = folder / "analysis"
        analysis.mkdir()
        result.table.write_csv(analysis / "groups.csv", result.pruned)
        result.evidence.save(analysis / "scores.safetensors")
        gradients = {
            **result.gradients.to_dict(),
            "pruning": to_json(result.distribution),
            "warning": result.warning,
        }
        write_json(analysis / "gradients.json", gradients)
        if result.search is not None:
            write_json(analysis / "search.json", search_to_dict(result.search, result.config))
        plots = result.gradients.write_plots(folder / "gradient_analysis")
        summary, record = summarize(result), _run_record(result)
        write_json(analysis / "summary.json", summary)
        write_json(folder / "run.json", record)
        write_report(folder / "report.html", summary, record, gradients, plots, result.search)
    return result


def _run_record(result: PruneResult) -> dict[str, Any]:
    """The content of `run.json`: what ran, with which versions, for how long."""
    return {
        "config": result.config.to_dict(),
        "versions": {
            "gradprune": gradprune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": str(result.model.device),
        "seed": result.config.seed,
        "seconds": result.seconds,
    }
