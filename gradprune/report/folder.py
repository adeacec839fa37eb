"""The results folder: which files a run writes, and what they contain."""

import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from gradprune.checkpoint.atomic import atomic_directory
from gradprune.checkpoint.results import weight_bytes_on_disk
from gradprune.checkpoint.save import write_checkpoint
from gradprune.config import PruneConfig, rerun_command
from gradprune.export.serve import write_served
from gradprune.models import BlockKey, shown_kinds
from gradprune.models.masks import GroupMasks
from gradprune.report.card import write_card
from gradprune.report.html import write_report
from gradprune.report.strict_json import write_json
from gradprune.report.tables import describe_scoring, search_verdict
from gradprune.report.visualizer import write_plots
from gradprune.result import PruneResult
from gradprune.scoring.over_pruning import to_json
from gradprune.search import SearchResult
from gradprune.version import __version__


def summarize(result: PruneResult) -> dict[str, Any]:
    """Return the content of `analysis/summary.json`."""
    distilled = result.distillation
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
        "tasks": [
            {"task": before.task, "questions": before.questions, "before": asdict(before), "after": asdict(after)}
            for before, after in zip(result.before.tasks, result.after.tasks, strict=True)
        ],
        "generations": [
            {"prompt": prompt, "dense": dense, "pruned": pruned}
            for prompt, dense, pruned in zip(
                result.prompts, result.before.generations, result.after.generations, strict=True
            )
        ],
        "evaluation_tokens": result.before.perplexity.tokens,
        "evaluation_held_out": result.held_out,
        "calibration": {
            name: getattr(result.evidence, name)
            for name in ("num_samples", "seq_len", "reduction", "seed", "dataset", "own_text")
        },
        "warnings": result.warnings,
        "layers": [_layer_summary(result.masks, layer) for layer in range(result.masks.layers)],
        "repair": [asdict(repair) for repair in result.repairs],
        "distillation": distilled and asdict(distilled),
    }


def _layer_summary(masks: GroupMasks, layer: int) -> dict[str, Any]:
    """Count the layer's groups of each kind before pruning and those kept; zeros if it has no block of the kind."""
    summary: dict[str, Any] = {"layer": layer}
    for kind in shown_kinds(key.kind for key in masks):
        key = BlockKey(layer, kind.name)
        kept = masks[key] if key in masks else torch.empty(0)
        summary[kind.name] = {kind.unit: len(kept), "kept": int(kept.sum())}
    return summary


def write_results(result: PruneResult, tokenizer: PreTrainedTokenizerBase | None, output: Path) -> PruneResult:
    """Write the results folder completely or, if interrupted, not at all; return the result with its location."""
    with atomic_directory(output, overwrite=result.config.overwrite, argument="output_name") as folder:
        write_checkpoint(result.model, tokenizer, folder / "model", result.config.max_shard_size)
        write_served(result.model, tokenizer, result.config.constraints, folder)
        on_disk = weight_bytes_on_disk(folder / "model")
        result = replace(
            result, after=replace(result.after, bytes_on_disk=on_disk or result.after.bytes_on_disk), output=output
        )
        analysis = folder / "analysis"
        analysis.mkdir()
        result.table.write_csv(analysis / "groups.csv", result.pruned)
        result.evidence.save(analysis / "evidence.safetensors")
        gradients = {
            **result.gradients.to_dict(),
            "pruning": to_json(result.distribution),
            "warning": result.over_pruning_warning,
        }
        write_json(analysis / "gradients.json", gradients)
        if result.search is not None:
            write_json(analysis / "search.json", search_to_dict(result.search, result.config))
        plots = write_plots(result.gradients.steps, folder / "gradient_analysis")
        summary = summarize(result)
        record = _run_record(result, summary)
        write_card(folder / "model", result.model.config, result.config, summary)
        write_json(analysis / "summary.json", summary)
        write_json(folder / "run.json", record)
        write_report(folder / "report.html", summary, record, gradients, plots, result.search)
    return result


def _run_record(result: PruneResult, summary: dict[str, Any]) -> dict[str, Any]:
    """Return the content of `run.json`: options, versions and timings."""
    return {
        "config": result.config.to_dict(),
        "versions": {
            "gradprune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": str(result.model.device),
        "calibration": summary["calibration"],
        "seed": result.config.seed,
        "seconds": result.seconds,
    }


def search_to_dict(result: SearchResult, config: PruneConfig) -> dict[str, Any]:
    """Return the content of `analysis/search.json`; `config` has the options that the search chose."""
    return {
        "candidates": result.candidates,
        "cut_short": result.cut_short,
        "decides": result.decides,
        "verdict": search_verdict(result),
        "standard_errors_needed": result.threshold,
        "command": rerun_command(config),
        "trials": [
            {"rank": rank, "setting": describe_scoring(trial.scoring), **asdict(trial)}
            for rank, trial in enumerate(result.trials, start=1)
        ],
    }
