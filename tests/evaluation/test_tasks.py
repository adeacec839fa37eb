import json
import math
import sys
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers

from gradprune.checkpoint.load import load_model
from gradprune.demo import byte_tokenizer
from gradprune.errors import EvaluationError
from gradprune.evaluation.tasks import Question, TaskAccuracy, answer_questions, evaluate_tasks, read_questions
from gradprune.models.shrink import with_random_weights
from gradprune.report.rows import summary_rows
from gradprune.surgery.cut import cut
from helpers.cut_models import random_masks
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_model

QUESTIONS = [
    Question(("Sky is", "Sky is", "Sky is"), ("blue", "a green thing", "up"), 1),
    Question(("One", "One"), ("two", "three"), 0),
    Question(("The cat ate, so the cat", "The cat ate, so the dog"), ("slept.", "slept."), 1),
    Question(("", "", "", ""), ("a", "bb", "ccc", "dddd"), 3),
    Question(("Trailing ", "Trailing "), ("space", "spaces and more"), 1),
]


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Return the log-likelihood of a continuation, from a separate forward pass over context and continuation."""
    text = context.rstrip(" ")
    start = tokenizer(text)["input_ids"]
    ids = tokenizer(text + (context[len(text) :] or " ") + continuation)["input_ids"]
    if not start:
        start, ids = [tokenizer.eos_token_id], [tokenizer.eos_token_id, *ids]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_p[i - 1, ids[i]].item() for i in range(len(start), len(ids)))


def expected(model, tokenizer, questions: list[Question], per_byte: bool) -> float:
    right = 0
    for question in questions:
        values = [
            log_likelihood(model, tokenizer, c, e) / (len(e.encode()) if per_byte else 1)
            for c, e in zip(question.contexts, question.continuations, strict=True)
        ]
        right += values.index(max(values)) == question.answer
    return right / len(questions)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_accuracies_are_those_of_separate_passes(architecture: str) -> None:
    tokenizer = byte_tokenizer()
    # Different seeds give different answers, so that a wrong likelihood shows.
    for seed in range(4):
        model = tiny_model(architecture, vocab=258, seed=seed)
        model = cut(model, random_masks(model, 0.6, seed=seed)) if seed % 2 else model
        for batch_size in (1, 3):
            found = answer_questions(model, tokenizer, QUESTIONS, name="q", batch_size=batch_size)
            assert found.accuracy == expected(model, tokenizer, QUESTIONS, per_byte=False)
            assert found.per_byte == expected(model, tokenizer, QUESTIONS, per_byte=True)


def assert_likelihoods_are_those_of_separate_passes(model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, seen = byte_tokenizer(), []
    monkeypatch.setattr("gradprune.evaluation.tasks._largest", lambda values: seen.append(values) or 0)
    answer_questions(model, tokenizer, QUESTIONS, name="q", batch_size=4)
    for question, values in zip(QUESTIONS, seen[::2], strict=True):
        pairs = zip(question.contexts, question.continuations, strict=True)
        exact = [log_likelihood(model, tokenizer, context, continuation) for context, continuation in pairs]
        assert values == pytest.approx(exact, rel=1e-9)


def test_likelihoods_do_not_depend_on_what_else_is_in_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_likelihoods_are_those_of_separate_passes(tiny_model(vocab=258), monkeypatch)


_SMALL = {"vocab_size": 258, "hidden_size": 16}
_DEEP = {**_SMALL, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
# In these models, an attention mask and position ids do not fully decide what each token sees.
NOT_DECIDED_BY_A_MASK = [
    transformers.MistralConfig(**_DEEP, sliding_window=4),
    transformers.Gemma2Config(**_DEEP, sliding_window=4, head_dim=4),
    transformers.Lfm2Config(**_DEEP, layer_types=["conv", "full_attention"]),
    transformers.BloomConfig(**_SMALL, n_layer=2, n_head=4),
    transformers.GPTNeoConfig(
        **_SMALL, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4
    ),
]


@pytest.mark.parametrize("config", NOT_DECIDED_BY_A_MASK, ids=lambda config: config.model_type)
def test_if_the_mask_does_not_decide_each_continuation_has_its_own_pass(
    config, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = with_random_weights(transformers.AutoModelForCausalLM.from_config(config)).double().eval()
    assert_likelihoods_are_those_of_separate_passes(model, monkeypatch)


def test_a_letter_of_two_bytes_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("gradprune.evaluation.tasks._largest", lambda values: seen.append(values) or 0)
    answer_questions(tiny_model(vocab=258), byte_tokenizer(), [Question(("En",) * 2, ("été", "hiver!"), 0)], name="q")
    whole, per_byte = seen
    assert per_byte == [whole[0] / 5, whole[1] / 6]


def test_a_context_that_is_too_long_loses_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's context is 64 tokens, of which the longest continuation, " yes", leaves 60."""
    seen = []
    monkeypatch.setattr("gradprune.evaluation.tasks._largest", lambda values: seen.append(values) or 0)
    for letters in (500, 60):
        question = Question(("x" * letters,) * 2, ("yes", "no"), 0)
        answer_questions(tiny_model(vocab=258), byte_tokenizer(), [question], name="q")
    assert seen[:2] == seen[2:]


def test_standard_errors_and_equal_continuations() -> None:
    model, tokenizer = tiny_model(vocab=258), byte_tokenizer()
    found = answer_questions(model, tokenizer, [QUESTIONS[2]] * 3, name="q")
    assert found.accuracy in (0.0, 1.0)
    assert (found.accuracy_stderr, found.per_byte, found.per_byte_stderr, found.questions) == (0.0, None, None, 3)
    mixed = [Question(q.contexts, q.continuations, answer) for answer in (0, 1) for q in (QUESTIONS[1],)]
    found = answer_questions(model, tokenizer, mixed, name="q")
    assert found.accuracy == 0.5
    assert found.accuracy_stderr == pytest.approx(math.sqrt(0.25 / 1))
    assert found.text() == "accuracy 50.0 ± 50.0 %, per byte 50.0 ± 50.0 % (2 questions)"


def test_one_question_has_no_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = answer_questions(tiny_model(vocab=258), byte_tokenizer(), QUESTIONS[1:2], name="q")
    assert (found.accuracy_stderr, found.per_byte_stderr) == (None, None)
    right = f"{100 * found.accuracy:.1f} %"
    assert found.text() == f"accuracy {right}, per byte {100 * (found.per_byte or 0.0):.1f} % (1 question)"
    task = {"task": "q", "before": asdict(found), "after": asdict(found)}
    empty = {"before": None, "after": None}
    unmeasured = dict.fromkeys(("parameters", "perplexity", "bytes_on_disk", "tokens_per_second"), empty)
    assert summary_rows({**unmeasured, "tasks": [task]})[0] == ("q accuracy", right, right, "+0.0 points")
    figures = {"acc,none": 1.0, "acc_stderr,none": "N/A", "acc_norm,none": 0.0, "acc_norm_stderr,none": "N/A"}
    stand_in_for_lm_eval(monkeypatch, {"results": {"piqa": figures}, "n-samples": {"piqa": {"effective": 1}}})
    (asked,) = evaluate_tasks(tiny_model(vocab=258), byte_tokenizer(), ["piqa"], max_questions=1)
    assert asked == TaskAccuracy("piqa", 1, 1.0, None, 0.0, None)


def write(path: Path, *records: object) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return str(path)


def test_both_forms_of_files_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"context": "One", "choices": ["two", "three"], "answer": 0},
        {"contexts": ["a", "b"], "continuation": "c", "answer": 1},
    )
    assert read_questions(path) == [QUESTIONS[1], Question(("a", "b"), ("c", "c"), 1)]


def test_files_are_measured_in_the_order_asked_and_limited_evenly(tmp_path: Path) -> None:
    many = [{"context": f"{n}", "choices": ["two", "three"], "answer": 0} for n in range(10)]
    first, second = write(tmp_path / "b.jsonl", *many), write(tmp_path / "a.jsonl", *many[:3])
    found = evaluate_tasks(tiny_model(vocab=258), byte_tokenizer(), [first, second], max_questions=4)
    assert [(each.task, each.questions) for each in found] == [("b", 4), ("a", 3)]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"context": "a", "choices": ["b", "c"]}',
        '{"context": "a", "choices": ["b", "c"], "answer": 2}',
        '{"context": "a", "choices": ["b", "c"], "answer": true}',
        '{"context": "a", "choices": ["b", ""], "answer": 0}',
        '{"context": 1, "choices": ["b", "c"], "answer": 0}',
        '{"contexts": ["a", "b"], "answer": 0}',
    ],
)
def test_a_malformed_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}\n' + line + "\n")
    with pytest.raises(EvaluationError, match=r"tasks: line 2 of .*q.jsonl"):
        read_questions(path)


def test_missing_or_empty_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"nowhere.jsonl.* cannot be read"):
        read_questions(tmp_path / "nowhere.jsonl")
    with pytest.raises(EvaluationError, match="contains no question"):
        read_questions(write(tmp_path / "empty.jsonl"))
    with pytest.raises(EvaluationError, match="no tokenizer"):
        evaluate_tasks(tiny_model(), None, ["x.jsonl"])
    path = write(tmp_path / "q.jsonl", {"context": "One", "choices": ["two", "three"], "answer": 0})
    for tasks in (["", ""], [path, " "]):
        with pytest.raises(EvaluationError, match=r"^tasks: '.*' contains an empty name"):
            evaluate_tasks(tiny_model(), byte_tokenizer(), tasks)
    with pytest.raises(EvaluationError, match="max_questions: 0"):
        evaluate_tasks(tiny_model(), byte_tokenizer(), [path], max_questions=0)


def test_named_tasks_need_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"piqa: named tasks need lm-eval.*pip install 'gradprune\[eval\]'"):
        evaluate_tasks(tiny_model(), byte_tokenizer(), ["piqa"])


def stand_in_for_lm_eval(monkeypatch: pytest.MonkeyPatch, results: dict) -> list[dict]:
    """Replace the three names that are imported from lm-eval, and return the list that records its calls."""
    calls: list[dict] = []
    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")}
    modules["lm_eval"].simple_evaluate = lambda **options: calls.append(options) or results
    modules["lm_eval.models.huggingface"].HFLM = lambda **options: options
    modules["lm_eval.tasks"].TaskManager = lambda: types.SimpleNamespace(all_tasks=["piqa", "mmlu", "gsm8k"])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_named_tasks_are_measured_by_lm_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = {
        "results": {
            "piqa": {"acc,none": 0.7, "acc_stderr,none": 0.01, "acc_norm,none": 0.71, "acc_norm_stderr,none": 0.02},
            "mmlu": {"acc,none": 0.3, "acc_stderr,none": 0.03},
        },
        "n-samples": {"piqa": {"effective": 50}, "mmlu_a": {"effective": 20}, "mmlu_b": {"effective": 10}},
        "group_subtasks": {"mmlu": ["mmlu_a", "mmlu_b"]},
    }
    calls = stand_in_for_lm_eval(monkeypatch, results)
    path = write(tmp_path / "q.jsonl", {"context": "One", "choices": ["two", "three"], "answer": 0})
    model, tokenizer = tiny_model(vocab=258), byte_tokenizer()
    found = evaluate_tasks(model, tokenizer, ["piqa", path, "mmlu"], max_questions=50, batch_size=4)
    assert [each.task for each in found] == ["piqa", "q", "mmlu"]
    assert (found[0].accuracy, found[0].per_byte, found[0].questions) == (0.7, 0.71, 50)
    assert (found[2].accuracy_stderr, found[2].per_byte, found[2].questions) == (0.03, None, 30)
    assert calls[0]["model"] == {"pretrained": model, "tokenizer": tokenizer, "batch_size": 4}
    assert calls[0]["limit"] == 50
    with pytest.raises(EvaluationError, match="does not know no_such_task"):
        evaluate_tasks(model, tokenizer, ["no_such_task"])


def test_a_small_real_model_is_close_to_chance_on_real_tasks(stories_model: Path, shared_tasks: Path) -> None:
    model, tokenizer = load_model(stories_model)
    names = ("piqa", "winogrande")
    found = evaluate_tasks(model, tokenizer, [str(shared_tasks / f"{name}.jsonl") for name in names], max_questions=100)
    for each in found:
        assert each.questions == 100
        assert 0.3 < each.accuracy < 0.75, "a model of 260,000 parameters is close to chance"
        assert each.accuracy_stderr == pytest.approx(0.05, abs=0.01)
    assert found[1].per_byte is None
