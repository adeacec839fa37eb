"""Greedy continuations of prompts, and how a run shows them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from gradprune import PruneConfig, prune
from gradprune.demo.model import byte_tokenizer
from gradprune.errors import EvaluationError
from gradprune.evaluation.generations import continuations, drawn_prompts, read_prompts
from helpers.pipeline_runs import TOKENS
from helpers.tiny_models import tiny_model

TOKENIZER = byte_tokenizer()
OPTIONS = {"num_samples": 8, "seq_len": 16, "batch_size": 4, "backend": "reference", "measure_speed": False}


def likeliest(model: PreTrainedModel, prompt: str, count: int) -> list[int]:
    """Return the `count` greedy tokens after `prompt`, each from a separate forward pass without a cache."""
    ids = TOKENIZER(prompt, return_tensors="pt")["input_ids"]
    found = ids
    with torch.no_grad():
        for _ in range(count):
            found = torch.cat([found, model.eval()(found).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return found[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "recommended",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 50},
        {"repetition_penalty": 9.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 4},
        {"suppress_tokens": list(range(0, 300, 2))},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_continuations_are_greedy_whatever_the_checkpoint_recommends(recommended: dict) -> None:
    model = tiny_model(vocab=300)
    expected = TOKENIZER.decode(likeliest(model, "abacad", 32), skip_special_tokens=True)
    model.generation_config.update(**recommended, eos_token_id=None)
    before = model.generation_config
    assert continuations(model.train(), TOKENIZER, ["abacad"]) == (expected,)
    assert model.training
    assert model.generation_config is before


def test_a_continuation_ends_at_an_eos_token_of_the_checkpoint() -> None:
    model = tiny_model(vocab=300)
    tokens = likeliest(model, "abacad", 32)
    model.generation_config.eos_token_id = [299, tokens[4]]
    first = tokens.index(tokens[4]) + 1
    expected = TOKENIZER.decode(tokens[:first], skip_special_tokens=True)
    assert continuations(model, TOKENIZER, ["abacad"]) == (expected,)


def test_a_prompt_longer_than_the_context_is_cut() -> None:
    model = tiny_model(vocab=300)
    assert continuations(model, TOKENIZER, ["ab" * 500]) == continuations(model, TOKENIZER, ["ab" * 16])


def test_a_prompt_without_tokens_is_continued() -> None:
    assert len(continuations(tiny_model(vocab=300), TOKENIZER, [""])) == 1


def test_prompts_are_spread_evenly_over_the_text() -> None:
    prompts = drawn_prompts(TOKENIZER, TOKENS)
    assert len(prompts) == 3
    assert prompts[1] == TOKENIZER.decode(TOKENS[len(TOKENS) // 3 :][:24])
    sentence = "a bird sings, nobody hears\nit "
    words = torch.tensor(TOKENIZER(sentence * 7)["input_ids"][: 7 * len(sentence)])
    assert drawn_prompts(TOKENIZER, words)[:2] == ["bird sings, nobody", "nobody hears\nit a"]
    assert drawn_prompts(TOKENIZER, torch.zeros(0, dtype=torch.int64)) == []


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n two \n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["one", " two "]
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for name in ("empty.txt", "bytes.txt", "nowhere.txt"):
        with pytest.raises(EvaluationError, match=r"^prompts: "):
            read_prompts(tmp_path / name)


def test_the_report_shows_both_models(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("ab<b>ac\n")
    config = PruneConfig(**OPTIONS, prompts=str(tmp_path / "p.txt"), output_dir=str(tmp_path), output_name="x")
    result = prune(tiny_model(vocab=300), TOKENIZER, config, calibration=TOKENS[:1500], evaluation=TOKENS[1500:])
    (shown,) = json.loads((tmp_path / "x" / "analysis" / "summary.json").read_text())["generations"]
    assert shown == {
        "prompt": "ab<b>ac", "dense": result.before.generations[0], "pruned": result.after.generations[0]
    }  # fmt: skip
    assert shown["pruned"] == continuations(result.model, TOKENIZER, ["ab<b>ac"])[0]
    report = (tmp_path / "x" / "report.html").read_text()
    assert f"<dd>ab&lt;b&gt;ac</dd><dt>dense</dt><dd>{shown['dense']}</dd>" in report


def test_generations_can_be_switched_off() -> None:
    config = PruneConfig(**OPTIONS, generations=False)
    result = prune(tiny_model(vocab=300), TOKENIZER, config, calibration=TOKENS[:1500], evaluation=TOKENS[1500:])
    assert result.prompts == result.after.generations == ()
