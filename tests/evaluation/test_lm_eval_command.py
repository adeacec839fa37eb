"""lm-eval's own command on a pruned checkpoint, which it loads like any model with remote code."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from gradprune.checkpoint.save import save_checkpoint
from gradprune.demo.model import byte_tokenizer
from gradprune.evaluation.tasks import evaluate_tasks
from gradprune.surgery.cut import cut
from helpers.cut_models import random_masks
from helpers.programs import run_program
from helpers.tiny_models import tiny_model

TASK = """task: quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
COMMAND = "--model hf --tasks quiz --include_path . --batch_size 4 --device cpu --output_path out --model_args"


def test_lm_eval_measures_the_same_accuracies(tmp_path: Path) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed (pip install 'gradprune[eval]')")
    model = tiny_model(vocab=300, dtype=torch.float32)
    model = cut(model, random_masks(model, 0.6))
    tokenizer = byte_tokenizer()
    save_checkpoint(model, tokenizer, tmp_path / "model")
    questions = [
        {"context": f"{number} is", "choices": [f"a{number}", "bb", f"c {number * 7}"], "answer": number % 3}
        for number in range(24)
    ]
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "quiz.yaml").write_text(TASK.format(file=quiz))
    arguments = [*COMMAND.split(), f"pretrained={tmp_path / 'model'},trust_remote_code=True"]
    command = [sys.executable, "-m", "lm_eval", *arguments]
    done = run_program(command, cwd=tmp_path, environment={"HF_HOME": str(tmp_path / "home")})
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["quiz"]
    (expected,) = evaluate_tasks(model, tokenizer, [str(quiz)])
    assert found["acc,none"] == pytest.approx(expected.accuracy)
    assert found["acc_norm,none"] == pytest.approx(expected.per_byte)
