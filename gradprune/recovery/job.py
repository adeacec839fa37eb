"""The whole job of `gradprune recover`: measure perplexity, train, measure again and write a checkpoint."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradprune.checkpoint.atomic import atomic_directory
from gradprune.checkpoint.results import claimed_results
from gradprune.checkpoint.save import save_checkpoint
from gradprune.config import PruneConfig
from gradprune.config.recovery_config import RecoveryConfig
from gradprune.data.samples import calibration_and_evaluation
from gradprune.evaluation.perplexity import perplexity
from gradprune.evaluation.size import model_size
from gradprune.models.sizes import vocabulary_of
from gradprune.progress import QUIET
from gradprune.recovery.recover import Recovery, recover
from gradprune.report.card import write_recovered_card
from gradprune.report.strict_json import write_json
from gradprune.version import __version__


def recover_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher: PreTrainedModel | None,
    config: RecoveryConfig,
    places: PruneConfig,
    *,
    console: Console = QUIET,
) -> dict[str, Any]:
    """Recover a model and write `model/`, `analysis/summary.json` and `run.json` into a results folder.

    An interrupted job leaves a hidden folder beside the results folder, from which the same command resumes.

    Args:
        model, tokenizer: the pruned model, which is trained in place, and its tokenizer.
        teacher: the dense model, needed for loss "kd", or None.
        config: the options of the training.
        places: the other options, of which these are used: the datasets, the batch size and number of windows for
            perplexity, the model's path, and the output folder and whether it may be replaced.
        console: where progress is shown.

    Returns:
        The content of `summary.json`: the number of parameters, the perplexity before and after on text that is used
        neither for training nor for choosing weights, the method and loss, the number of steps and of their tokens, the
        step whose weights were kept, and the held-out loss by step.

    Raises:
        GradPruneError: see `recover`; or text is missing or too short; or the output folder may not be replaced or
            cannot be written.
    """
    text, held_out = calibration_and_evaluation(tokenizer, places, None, None, vocabulary_of(model))
    measured = partial(
        perplexity,
        model,
        held_out,
        seq_len=config.seq_len,
        batch_size=places.batch_size,
        max_windows=places.eval_samples,
        console=console,
    )
    with claimed_results(places) as output:
        assert output is not None, "output_name is needed"
        before = measured().value
        found = recover(model, teacher, text, config, state=state_folder(output), console=console)
        summary = _summary(found, config, before, measured().value)
        with atomic_directory(output, overwrite=places.overwrite, argument="output_name") as folder:
            taught_by = None if teacher is None else teacher.name_or_path or None
            _write(folder, found.model, tokenizer, summary, places, taught_by)
            record = {"config": _recorded(config, places, taught_by), "versions": {"gradprune": __version__}}
            write_json(folder / "run.json", record)
    return summary


def state_folder(output: Path) -> Path:
    """Return the hidden folder that keeps the state of an unfinished recovery into `output`."""
    return output.with_name(f".{output.name}.recovery")


def _summary(found: Recovery, config: RecoveryConfig, before: float, after: float) -> dict[str, Any]:
    """Return the content of `summary.json`; before, after: perplexities."""
    return {
        "parameters": model_size(found.model).parameters,
        "perplexity": {"before": before, "after": after},
        "method": config.method,
        "loss": config.loss,
        "steps": found.steps,
        "tokens": found.tokens,
        "best_step": found.best_step,
        "history": [{"step": step, "loss": loss} for step, loss in found.history],
    }


def _write(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    summary: dict[str, Any],
    places: PruneConfig,
    teacher: str | None,
) -> None:
    """Write the checkpoint with its model card, and `summary.json`; teacher: the teacher's name, if there is one."""
    save_checkpoint(model, tokenizer, folder / "model")
    write_recovered_card(folder / "model", model.config, places.base_model, summary, teacher)
    (folder / "analysis").mkdir()
    write_json(folder / "analysis" / "summary.json", summary)


def _recorded(config: RecoveryConfig, places: PruneConfig, teacher: str | None) -> dict[str, Any]:
    """Return the options of the command, by name; teacher: the teacher's name, if there is one."""
    names = ("dataset", "eval_dataset", "eval_samples", "output_dir", "output_name")
    named = {name: getattr(places, name) for name in names}
    return {"model": places.base_model, "teacher": teacher, **named, **asdict(config)}
