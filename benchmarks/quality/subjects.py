"""What quality is measured on, models with their texts, and how it is measured."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.environment import ROOT
from benchmarks.options import folder_of
from benchmarks.progress import say
from benchmarks.quality.peers.torch_pruning import without_grouped_queries
from gradprune.checkpoint.gguf_source import find_gguf
from gradprune.checkpoint.load import load_model
from gradprune.data.sources import load_tokens
from gradprune.demo import demo_model_path
from gradprune.errors import CheckpointError
from gradprune.evaluation.perplexity import perplexity
from gradprune.evaluation.size import model_size
from gradprune.evaluation.tasks import evaluate_tasks

MODELS = ("stories260k", "stories260k-repeated", "demo", "demo-repeated")
SMOLLM2 = "smollm2-135m"
SHARED = ROOT.parent / "shared"


def _shared_texts(name: str) -> tuple[str, str]:
    """Paths of the calibration and the evaluation text of a name, in the folder `shared` beside the repository."""
    calibration, evaluation = (str(SHARED / "text" / f"{name}_{part}.txt") for part in ("calibration", "eval"))
    return calibration, evaluation


STORIES_MODEL = SHARED / "models" / "stories260k"
STORIES, WIKITEXT2 = _shared_texts("stories"), _shared_texts("wikitext2_raw")


@dataclass(frozen=True)
class Subject:
    """A loaded model with its texts, [tokens] int64 each."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    calibration: Tensor
    evaluation: Tensor


@dataclass(frozen=True)
class Quality:
    """The measured quality of a model. accuracies: by task, in [0, 1]. parameters: their number."""

    perplexity: float
    accuracies: dict[str, float]
    parameters: int


def add_model_options(made: ArgumentParser, base_model: str | None = None) -> None:
    """Add the options for the model to measure and its texts; base_model: help of the option --base_model."""
    made.add_argument("--base_model", help=base_model)
    made.add_argument("--dataset", help="calibration text; its name becomes part of the model's in results")
    made.add_argument("--eval_dataset", help="text that perplexity is measured on; named likewise in results")


def add_task_options(made: ArgumentParser) -> None:
    """Add the options for the zero-shot questions that `quality_of` asks."""
    made.add_argument(
        "--tasks", type=folder_of("*.jsonl"), default=None, help="folder of .jsonl files with zero-shot questions"
    )
    made.add_argument("--max_questions", type=int, default=None, help="at most this many of each task")


def subjects(options: Namespace) -> Iterator[Subject]:
    """Yield the subject that --base_model names; without it, each of --models that is available."""
    if options.base_model is not None:
        yield chosen_subject(options)
        return
    for name, source in _sources(options).items():
        chosen = {name, f"{name}-repeated"} & set(options.models)
        if not chosen:
            continue
        subject = _load(name, source, options)
        if name in chosen:
            yield subject
        if f"{name}-repeated" in chosen:
            repeated = without_grouped_queries(subject.model).to(options.device)
            yield replace(subject, name=f"{name}, KV heads repeated{_on_texts(options)}", model=repeated)


def chosen_subject(options: Namespace) -> Subject:
    """Load the subject that --base_model names; without it SmolLM2-135M, or the demo model for --toy."""
    if options.base_model is not None:
        return _load(Path(options.base_model).name, Source(options.base_model), options)
    if options.toy:
        return _load(demo_model_path().name, Source(str(demo_model_path())), options)
    return _load(SMOLLM2, Source(SMOLLM2, WIKITEXT2), options)


class Source(NamedTuple):
    """The path or name of a model, and its calibration and evaluation texts; None stands for the embedded text."""

    base_model: str
    texts: tuple[str | None, str | None] = (None, None)


def _sources(options: Namespace) -> dict[str, Source]:
    """The sources of all models that are available, by name."""
    sources: dict[str, Source] = {}
    if STORIES_MODEL.is_dir():
        sources["stories260k"] = Source(str(STORIES_MODEL), STORIES)
    if not (options.toy or (options.quick and STORIES_MODEL.is_dir())):
        sources["demo"] = Source(str(demo_model_path()))
    if SMOLLM2 in options.models:
        try:
            find_gguf(SMOLLM2)
            sources[SMOLLM2] = Source(SMOLLM2, WIKITEXT2)
        except CheckpointError as error:
            say(f"SKIPPED: {SMOLLM2}: {error}")
    return sources


def _load(name: str, source: Source, options: Namespace) -> Subject:
    """Load a model with the texts that the options name, and its own texts in place of any that they do not."""
    model, tokenizer = load_model(source.base_model, device=options.device)
    calibration = load_tokens(options.dataset or source.texts[0], tokenizer)
    evaluation = load_tokens(options.eval_dataset or source.texts[1], tokenizer, split="evaluation")
    return Subject(f"{name}{_on_texts(options)}", model, tokenizer, calibration, evaluation)


def _on_texts(options: Namespace) -> str:
    """Suffix of a model's name if options name texts, because results on different texts must not share a table."""
    named = {"on": options.dataset, "evaluated on": options.eval_dataset}
    return "".join(f", {how} {Path(text).name}" for how, text in named.items() if text is not None)


def quality_of(model: PreTrainedModel, subject: Subject, options: Namespace) -> Quality:
    """Measure a model on the subject's evaluation text, and on the zero-shot tasks if the options name a folder."""
    value = perplexity(
        model, subject.evaluation, seq_len=options.seq_len, batch_size=8, max_windows=options.eval_samples
    ).value
    files = [] if options.tasks is None else sorted(str(path) for path in options.tasks.glob("*.jsonl"))
    answered = evaluate_tasks(model, subject.tokenizer, files, max_questions=options.max_questions) if files else ()
    return Quality(value, {found.task: found.accuracy for found in answered}, model_size(model).parameters)


def without_tasks(options: Namespace) -> Namespace:
    """A copy of the options with which `quality_of` asks no zero-shot questions."""
    return Namespace(**{**vars(options), "tasks": None})
