"""Zero-shot accuracy on multiple-choice questions, from JSONL files or from named lm-eval tasks."""

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradprune.data.tokenize import begins_with_bos
from gradprune.errors import EvaluationError, counted, one_line
from gradprune.models.loss import logits_of, token_nll
from gradprune.models.modeling_gradprune import text_config
from gradprune.models.modes import evaluation_mode
from gradprune.progress import QUIET, progress


@dataclass(frozen=True)
class TaskAccuracy:
    """Zero-shot accuracy on one task, with standard errors over its questions (None if there is only one question).

    accuracy: the fraction of questions whose right answer has the largest log-likelihood.
    per_byte: the same with each log-likelihood divided by the continuation's length in bytes, so that long answers are
        not penalised. For lm-eval tasks it is `acc_norm`, which divides by characters. None if all choices of a
        question have the same continuation, in every question.
    """

    task: str
    questions: int
    accuracy: float
    accuracy_stderr: float | None
    per_byte: float | None = None
    per_byte_stderr: float | None = None

    def text(self) -> str:
        """The accuracies on one line, in percent."""
        text = f"accuracy {percent(self.accuracy, self.accuracy_stderr)}"
        if self.per_byte is not None:
            text += f", per byte {percent(self.per_byte, self.per_byte_stderr)}"
        return f"{text} ({counted(self.questions, 'question')})"


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: each choice is a context with a continuation; the most likely one is the answer.

    answer: index of the right choice.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    answer: int


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    max_questions: int | None = None,
    console: Console = QUIET,
) -> tuple[TaskAccuracy, ...]:
    """Measure a model's zero-shot accuracy on each task.

    Args:
        model: a causal LM; measured in evaluation mode, and left in the mode it was in.
        tokenizer: the model's tokenizer.
        tasks: paths of JSONL files (see `read_questions`), or names of lm-eval tasks (these need the `eval` extra).
        batch_size: contexts per forward pass; affects only memory and speed.
        max_questions: ask at most this many per task, spread evenly over a JSONL file; None asks all.
        console: where progress is shown.

    Raises:
        EvaluationError: there is no tokenizer, a file is missing or malformed, `max_questions` is below 1, or lm-eval
            is not installed, does not know a name or cannot run a task.
    """
    read = read_tasks(tasks, tokenizer)
    return ask_tasks(model, read, batch_size=batch_size, max_questions=max_questions, console=console)


@dataclass(frozen=True)
class Tasks:
    """Tasks that are ready to be asked, of any number of models that share a tokenizer.

    names: the tasks as they were given. files: the questions of those tasks that are JSONL files, by path. lm_eval:
    lm-eval's function that runs the other tasks by name; None if there are no others.
    """

    names: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    files: Mapping[str, Sequence[Question]]
    lm_eval: Callable[..., dict[str, Any]] | None = None

    @property
    def named(self) -> list[str]:
        """The names of the tasks that lm-eval runs."""
        return [name for name in self.names if name not in self.files]


def read_tasks(tasks: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> Tasks:
    """Read and check tasks, so that mistakes surface before a question is asked. See `evaluate_tasks` for arguments."""
    if not all(task.strip() for task in tasks):
        raise EvaluationError(
            f"tasks: '{','.join(tasks)}' contains an empty name; give names or .jsonl files, separated by single commas"
        )
    if tokenizer is None:
        raise EvaluationError("tasks: the model has no tokenizer to read questions with")
    files = {task: read_questions(task) for task in tasks if task.endswith(".jsonl")}
    read = Tasks(tuple(tasks), tokenizer, files)
    return replace(read, lm_eval=_lm_eval(read.named)) if read.named else read


def ask_tasks(
    model: PreTrainedModel,
    tasks: Tasks,
    *,
    batch_size: int = 8,
    max_questions: int | None = None,
    console: Console = QUIET,
) -> tuple[TaskAccuracy, ...]:
    """Do as `evaluate_tasks` does, for tasks that `read_tasks` has read."""
    if max_questions is not None and max_questions < 1:
        raise EvaluationError(f"max_questions: {max_questions} is not at least 1")
    measured = _by_lm_eval(model, tasks, batch_size, max_questions)
    for task, questions in tasks.files.items():
        asked = questions if max_questions is None else _spread(questions, max_questions)
        measured[task] = answer_questions(
            model, tasks.tokenizer, asked, name=Path(task).stem, batch_size=batch_size, console=console
        )
    return tuple(measured[task] for task in tasks.names)


def read_questions(path: str | Path) -> list[Question]:
    """Read questions from a JSONL file, one JSON object per line.

    An object is either `{"context": str, "choices": [str, ...], "answer": int}`, where the right choice continues the
    context after a space, or `{"contexts": [str, ...], "continuation": str, "answer": int}`, where the continuation
    follows the right context. `answer` is a 0-based index.

    Raises:
        EvaluationError: the file is missing or empty, or a line is malformed; the message gives the line's number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"tasks: '{path}' cannot be read: {one_line(error)}") from error
    questions = [_question(line, f"line {n} of '{path}'") for n, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise EvaluationError(f"tasks: '{path}' contains no question")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
        if "contexts" in record:
            contexts = tuple(record["contexts"])
            continuations = (record["continuation"],) * len(contexts)
        else:
            continuations = tuple(record["choices"])
            contexts = (record["context"],) * len(continuations)
        answer = record["answer"]
        texts_only = all(isinstance(text, str) and text for text in continuations)
        texts_only = texts_only and all(isinstance(text, str) for text in contexts)
        if not texts_only or type(answer) is not int or not 0 <= answer < len(contexts):
            raise ValueError("texts must not be empty, and `answer` must be the index of one of them")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EvaluationError(
            f"tasks: {where} is no valid question ({type(error).__name__}: {error}); it needs context, choices and "
            "answer, or contexts, continuation and answer"
        ) from error
    return Question(contexts, continuations, answer)


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    name: str,
    batch_size: int = 8,
    console: Console = QUIET,
) -> TaskAccuracy:
    """Measure a model's accuracy on questions; `name` is what the task is called, other arguments as `evaluate_tasks`.

    A context and its continuation are tokenised together, as lm-eval does, so a token may span the boundary. If the
    model's attention can be masked so that each continuation sees only the context and itself, all continuations of a
    context share a single pass over it.
    """
    rows = [row for index, question in enumerate(questions) for row in _rows(tokenizer, index, question, model.config)]
    shared = _mask_decides(model, max((row.length for row in rows), default=0))
    if not shared:
        rows = [single for row in rows for single in row.split()]
    # The longest come first, so that a lack of memory shows in the first batch.
    rows.sort(key=lambda row: (-row.length, row.question))
    likelihoods: list[dict[int, float]] = [{} for _ in questions]
    shown = progress(console, f"Asking {name}", len(rows), "contexts")
    with torch.inference_mode(), evaluation_mode(model), shown as advance:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            for row, sums in zip(batch, _log_likelihoods(model, batch, shared), strict=True):
                likelihoods[row.question] |= dict(zip(row.answers, sums, strict=True))
            advance(len(batch))
    right, right_per_byte = [], []
    for question, found in zip(questions, likelihoods, strict=True):
        values = [found[index] for index in range(len(question.contexts))]
        per_byte = [v / len(text.encode()) for v, text in zip(values, question.continuations, strict=True)]
        right.append(_largest(values) == question.answer)
        right_per_byte.append(_largest(per_byte) == question.answer)
    differ = any(len(set(question.continuations)) > 1 for question in questions)
    rates = _mean_and_stderr(right), _mean_and_stderr(right_per_byte) if differ else (None, None)
    return TaskAccuracy(name, len(questions), *rates[0], *rates[1])


@dataclass(frozen=True)
class _Row:
    """One context with the continuations to score after it, as token ids.

    question: index of the question. answers: the indices of the continuations within the question.
    """

    question: int
    answers: list[int]
    context: list[int]
    continuations: list[list[int]]

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(ids) for ids in self.continuations)

    def split(self) -> "Iterator[_Row]":
        """Yield a separate row for each continuation."""
        for answer, continuation in zip(self.answers, self.continuations, strict=True):
            yield _Row(self.question, [answer], self.context, [continuation])


def _mask_decides(model: PreTrainedModel, length: int) -> bool:
    """Whether an attention mask and position ids fully decide what each token in a row of `length` tokens sees.

    They do not if layers carry a state from token to token, or if the model takes distances from the tokens' places in
    the row (ALiBi). And because the mask replaces the model's own, sliding windows must not be shorter than the row.
    """
    config: Any = text_config(model.config)
    kinds = set(getattr(config, "layer_types", None) or ("full_attention", "sliding_attention"))
    windows = (getattr(config, name, None) for name in ("sliding_window", "window_size"))
    windowed = "sliding_attention" in kinds and any(window is not None and length > window for window in windows)
    placed = "position_ids" in inspect.signature(model.get_decoder().forward).parameters
    attends = kinds <= {"full_attention", "sliding_attention"} and not model._is_stateful
    return attends and placed and not windowed and not getattr(config, "alibi", False)


def _rows(tokenizer: PreTrainedTokenizerBase, index: int, question: Question, config: Any) -> Iterator[_Row]:
    for context in dict.fromkeys(question.contexts):
        answers = [i for i, given in enumerate(question.contexts) if given == context]
        start, continuations = _encode(tokenizer, context, [question.continuations[i] for i in answers])
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None:
            start = start[-max(1, longest - max(len(ids) for ids in continuations)) :]
        yield _Row(index, answers, start, continuations)


def _encode(
    tokenizer: PreTrainedTokenizerBase, context: str, continuations: list[str]
) -> tuple[list[int], list[list[int]]]:
    """Return the context's token ids, and for each continuation (after a space) the token ids that it adds."""
    # Trailing spaces of the context move to the continuation: tokenizers merge them into the following word.
    text = context.rstrip(" ")
    gap = context[len(text) :] or " "
    start, *wholes = (_ids(tokenizer, each) for each in (text, *(text + gap + each for each in continuations)))
    added = [whole[min(len(start), len(whole) - 1) :] for whole in wholes]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    # The first token also needs a predecessor to be predicted from.
    begins = not start or begins_with_bos(tokenizer)
    return ([first or 0] if begins else []) + start, added


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _log_likelihoods(model: PreTrainedModel, rows: Sequence[_Row], shared: bool) -> list[list[float]]:
    """Return the log-likelihoods of each row's continuations, in nats; shared: mask continuations from each other."""
    longest = max(row.length for row in rows)
    packed = [_pack(row, longest) for row in rows]
    device, arguments = model.device, {}
    ids = torch.stack([each.ids for each in packed]).to(device)
    if shared:
        arguments["position_ids"] = torch.stack([each.positions for each in packed]).to(device)
        seen = torch.stack([each.seen for each in packed])[:, None].to(device)
        # An additive mask: every attention implementation except FlashAttention accepts one.
        mask = torch.zeros_like(seen, dtype=model.dtype).masked_fill_(~seen, torch.finfo(model.dtype).min)
        arguments["attention_mask"] = mask
    hidden = model.get_decoder()(input_ids=ids, use_cache=False, **arguments).last_hidden_state
    predictors = torch.cat([hidden[b, each.predictors] for b, each in enumerate(packed)])
    targets = torch.cat([ids[b, each.targets] for b, each in enumerate(packed)])
    log_likelihood = -token_nll(logits_of(model), predictors, targets).double().cpu()
    sums = [part.sum().item() for part in log_likelihood.split([len(c) for row in rows for c in row.continuations])]
    iterator = iter(sums)
    return [[next(iterator) for _ in row.continuations] for row in rows]


@dataclass(frozen=True)
class _Packed:
    """A row as one sequence of T tokens: the context, then its continuations one after another, then padding.

    ids, positions: [T] int64; each continuation's positions continue those of the context. seen: [T, T] bool, the
    tokens (columns) that each token (row) attends to. targets: [K] int64, indices of all continuation tokens.
    predictors: [K] int64, indices of the tokens from which the targets are predicted.
    """

    ids: Tensor
    positions: Tensor
    seen: Tensor
    predictors: Tensor
    targets: Tensor


def _pack(row: _Row, length: int) -> _Packed:
    context = len(row.context)
    ids, positions = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.int64)
    ids[: row.length] = torch.tensor([*row.context, *(i for c in row.continuations for i in c)])
    positions[:context] = torch.arange(context)
    seen = torch.ones(length, length, dtype=torch.bool).tril_()
    start = context
    predictors: list[int] = []
    targets: list[int] = []
    for continuation in row.continuations:
        end = start + len(continuation)
        positions[start:end] = torch.arange(context, context + len(continuation))
        seen[start:end, context:start] = False
        predictors += [context - 1, *range(start, end - 1)]
        targets += range(start, end)
        start = end
    return _Packed(ids, positions, seen, torch.tensor(predictors), torch.tensor(targets))


def percent(rate: float, stderr: float | None) -> str:
    """Format an accuracy in percent for readers, with its standard error if there is one."""
    return f"{100 * rate:.1f} %" if stderr is None else f"{100 * rate:.1f} ± {100 * stderr:.1f} %"


def _largest(values: list[float]) -> int:
    """Return the index of the largest value, the first of several equal ones."""
    return max(range(len(values)), key=values.__getitem__)


def _mean_and_stderr(right: list[bool]) -> tuple[float, float | None]:
    """Return the mean p and its standard error sqrt(p (1 - p) / (n - 1)), which is None for a single question."""
    p, n = sum(right) / len(right), len(right)
    return p, math.sqrt(p * (1.0 - p) / (n - 1)) if n > 1 else None


def _spread(questions: Sequence[Question], count: int) -> list[Question]:
    """Select at most `count` evenly spaced questions."""
    count = min(count, len(questions))
    return [questions[index * len(questions) // count] for index in range(count)]


def _by_lm_eval(
    model: PreTrainedModel, tasks: Tasks, batch_size: int, max_questions: int | None
) -> dict[str, TaskAccuracy]:
    """Run the tasks that belong to lm-eval, which fetches their questions from the hub."""
    if tasks.lm_eval is None:
        return {}
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tasks.tokenizer, batch_size=batch_size)
    try:
        found = tasks.lm_eval(model=wrapped, tasks=tasks.named, limit=max_questions)
    # Fetching a task's data can raise the exceptions of any of lm-eval's dependencies.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EvaluationError(f"tasks: lm-eval cannot ask {', '.join(tasks.named)}: {reason}") from error
    return {name: _from_lm_eval(name, found) for name in tasks.named}


def _lm_eval(names: Sequence[str]) -> Callable[..., dict[str, Any]]:
    """Return lm-eval's `simple_evaluate`, bound to its `TaskManager`; raise if lm-eval is missing or lacks a name."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            f"tasks: {', '.join(names)}: named tasks need lm-eval, which the eval extra installs (pip install "
            "'gradprune[eval]'); or give .jsonl files of questions"
        ) from error
    manager = TaskManager()
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise EvaluationError(f"tasks: lm-eval does not know {', '.join(unknown)}; `lm_eval ls tasks` lists its tasks")
    return partial(simple_evaluate, task_manager=manager)


def _from_lm_eval(name: str, found: dict[str, Any]) -> TaskAccuracy:
    """Convert lm-eval's results for one task or group of tasks."""
    figures = found["results"][name]
    if "acc,none" not in figures:
        raise EvaluationError(f"tasks: lm-eval measures no accuracy for '{name}'; choose tasks for which it does")
    counts = found.get("n-samples", {})
    members = [name] if name in counts else found.get("group_subtasks", {}).get(name, [])
    return TaskAccuracy(
        name,
        sum(counts[member]["effective"] for member in members),
        figures["acc,none"],
        _stderr(figures.get("acc_stderr,none")),
        figures.get("acc_norm,none"),
        _stderr(figures.get("acc_norm_stderr,none")),
    )


def _stderr(found: Any) -> float | None:
    """Convert a standard error as lm-eval gives it; it is "N/A", here None, if there is only one question."""
    return float(found) if isinstance(found, (int, float)) and math.isfinite(found) else None
