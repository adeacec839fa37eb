"""What quality is measured on: models with their texts, and how a model is measured there."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.environment import ROOT
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
    """What is measured of a model: accuracies in [0, 1] by task, and parameters."""

    perplexity: float
    accuracies: dict[str, float]
    parameters: int


def add_model_options(made: ArgumentParser, base_model: str | None = None) -> None:
    """The model to measure and its texts; base_model: what help says of the model."""
    made.add_argument("--base_model", help=base_model)
    made.add_argument("--dataset")
    made.add_argument("--eval_dataset")


def add_task_options(made: ArgumentParser) -> None:
    """What `quality_of` asks."""
    made.add_argument("--tasks", type=Path, default=None, help="folder of .jsonl files with zero-shot questions")
    made.add_argument("--max_questions", type=int, default=None, help="at most this many of each task")


def subjects(options: Namespace) -> Iterator[Subject]:
    """What --base_model names, with its texts; else each of --models that is here."""
    if options.base_model is not None:
        yield load_subject(options.base_model, options.dataset, options.eval_dataset, options.device)
        return
    for name, source in _sources(options).items():
        chosen = {name, f"{name}-repeated"} & set(options.models)
        if not chosen:
            continue
        subject = replace(load_subject(*source, options.device), name=name)
        if name in chosen:
            yield subject
        if f"{name}-repeated" in chosen:
            repeated = without_grouped_queries(subject.model).to(options.device)
            yield replace(subject, name=f"{name}, KV heads repeated", model=repeated)


def _sources(options: Namespace) -> dict[str, tuple[str, str | None, str | None]]:
    """By model, where it is and its two texts; those that are not there are left out."""
    sources: dict[str, tuple[str, str | None, str | None]] = {}
    stories = SHARED / "models" / "stories260k"
    if stories.is_dir():
        sources["stories260k"] = (str(stories), *shared_texts("stories"))
    if not (options.toy or (options.quick and stories.is_dir())):
        sources["demo"] = (str(demo_model_path()), None, None)
    if SMOLLM2 in options.models:
        texts = smollm2_texts(options)
        try:
            find_gguf(SMOLLM2)
            sources[SMOLLM2] = (SMOLLM2, *texts)
        except CheckpointError as error:
            say(f"SKIPPED: {SMOLLM2}: {error}")
    return sources


def smollm2_texts(options: Namespace) -> tuple[str | None, str | None]:
    """What --dataset and --eval_dataset name; else two parts of WikiText-2."""
    return (options.dataset, options.eval_dataset) if options.dataset else shared_texts("wikitext2_raw")


def shared_texts(name: str) -> tuple[str, str]:
    """Calibration and evaluation text of that name, beside the repository."""
    calibration, evaluation = (str(SHARED / "text" / f"{name}_{part}.txt") for part in ("calibration", "eval"))
    return calibration, evaluation


def load_subject(base_model: str, dataset: str | None, eval_dataset: str | None, device: str) -> Subject:
    """Load a model with its texts; those that are None are the embedded ones."""
    model, tokenizer = load_model(base_model, device=device)
    evaluation = load_tokens(eval_dataset, tokenizer, split="evaluation")
    return Subject(Path(base_model).name, model, tokenizer, load_tokens(dataset, tokenizer), evaluation)


def chosen_subject(options: Namespace) -> Subject:
    """What --base_model names, with its texts; else SmolLM2-135M, or the demo model for --toy."""
    if options.base_model is not None:
        source = (options.base_model, options.dataset, options.eval_dataset)
    elif options.toy:
        source = (str(demo_model_path()), None, None)
    else:
        source = (SMOLLM2, *smollm2_texts(options))
    return load_subject(*source, options.device)


def quality_of(model: PreTrainedModel, subject: Subject, options: Namespace) -> Quality:
    """Measure a model on the subject's text, and on the tasks of the options where they name a folder."""
    value = perplexity(
        model, subject.evaluation, seq_len=options.seq_len, batch_size=8, max_windows=options.eval_samples
    ).value
    files = [] if options.tasks is None else sorted(str(path) for path in options.tasks.glob("*.jsonl"))
    answered = evaluate_tasks(model, subject.tokenizer, files, max_questions=options.max_questions) if files else ()
    return Quality(value, {found.task: found.accuracy for found in answered}, model_size(model).parameters)


def without_tasks(options: Namespace) -> Namespace:
    """The options of `quality_of` that ask no zero-shot question."""
    return Namespace(**{**vars(options), "tasks": None})
