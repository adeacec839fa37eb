"""The whole job on a loaded model: calibrate, score, select, cut, measure, and write the results if asked."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from gradprune.evaluate import Perplexity, Throughput, model_size, perplexity, throughput, weight_bytes_on_disk
from gradprune.gradients.diagnosis import diagnose_gradients
from gradprune.gradients.statistics import LayerGradients
from gradprune.groups import GroupTable, group_costs, importance_column
from gradprune.hgsp import Priors, modulate, removal_priors, removal_steps, similarity_priors, taylor_priors
from gradprune.importance import ImportanceEngine
from gradprune.masks import GroupMasks
from gradprune.models import PrunableModel, describe
from gradprune.progress import progress
from gradprune.report import write_json, write_report
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
    masks: what each block kept. gradients: the layers' gradient statistics.
    seconds: wall time by stage. output: the results folder, None where nothing was written.
    """

    model: PreTrainedModel
    config: PruneConfig
    before: Measured
    after: Measured
    table: GroupTable
    pruned: NDArray[np.bool_]
    masks: GroupMasks
    gradients: list[LayerGradients]
    seconds: dict[str, float] = field(default_factory=dict)
    output: Path | None = None


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
    clock = _Clock()
    view = describe(model)
    size = model_size(model)
    constraints = _check_reachable(model, view, size.parameters, config)
    engine = ImportanceEngine(
        model, config.importance_method, config.reduction, config.backend, config.use_gradient_checkpointing
    )
    calibration, evaluation = _tokens(tokenizer, config, calibration, evaluation, model.config.vocab_size)
    windows = sample_windows(calibration, num_samples=config.num_samples, seq_len=config.seq_len, seed=config.seed)

    # Calibration comes first: where weights are broken, it names the layer, which perplexity cannot.
    table, gradients = _score(model, view, engine, windows, config, clock, console)
    with clock.stage("perplexity_before"):
        perplexity_before = _perplexity(model, evaluation, config, console)
    disk = weight_bytes_on_disk(config.base_model) if config.base_model else None
    before = Measured(size.parameters, disk or size.bytes, perplexity_before)
    with clock.stage("selection"):
        pruned = select(table, config.pruning_ratio, size.parameters, constraints)
        masks = table.masks(pruned)
    with clock.stage("surgery"):
        cut_model = cut(model, masks, inplace=not config.measure_speed)
    with clock.stage("perplexity_after"):
        size = model_size(cut_model)
        after = Measured(size.parameters, size.bytes, _perplexity(cut_model, evaluation, config, console))
    if config.measure_speed:
        with clock.stage("speed"):
            speed = throughput({"dense": model, "pruned": cut_model}, seq_len=config.seq_len, seed=config.seed)
        before, after = replace(before, speed=speed["dense"]), replace(after, speed=speed["pruned"])
    result = PruneResult(cut_model, config, before, after, table, pruned, masks, gradients, clock.seconds)
    return result if output is None else _write(result, tokenizer, output)


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
    }


class _Clock:
    """Wall seconds by stage, in the order the stages ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 4)


def _check_reachable(model: PreTrainedModel, view: PrunableModel, parameters: int, config: PruneConfig) -> Constraints:
    """The selection's constraints; raises at once what could not be done after calibration."""
    check_context(model.config, config.seq_len)
    constraints = Constraints.of(config, _kept_kv_groups(model, view) if config.uniform else None)
    check_reachable(group_costs(view), config.pruning_ratio, parameters, constraints)
    return constraints


def _score(
    model: PreTrainedModel,
    view: PrunableModel,
    engine: ImportanceEngine,
    windows: Tensor,
    config: PruneConfig,
    clock: _Clock,
    console: Console,
) -> tuple[GroupTable, list[LayerGradients]]:
    """Calibrate: every group with its importance, prior and score, and the gradient statistics."""
    with clock.stage("calibration"):
        if engine.method != "magnitude":
            calibrate(engine, windows, config.batch_size, console)
        scores = engine.scores()
    with clock.stage("priors"):
        priors = _priors(model, view, engine, windows[: config.prior_samples], config, console)
    with clock.stage("scoring"):
        table = replace(group_costs(view), importance=importance_column(scores))
        return modulate(table, config.temperature, config.tau, priors), scores.gradients


def _priors(
    model: PreTrainedModel,
    view: PrunableModel,
    engine: ImportanceEngine,
    samples: Tensor,
    config: PruneConfig,
    console: Console,
) -> Priors | None:
    if config.temperature == 0.0:
        return None
    if config.prior == "taylor":
        return taylor_priors(engine)
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
        if result.gradients:
            write_json(analysis / "gradients.json", diagnose_gradients(result.gradients).to_dict())
        summary, record = summarize(result), _run_record(result)
        write_json(analysis / "summary.json", summary)
        write_json(folder / "run.json", record)
        write_report(folder / "report.html", summary, record)
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
