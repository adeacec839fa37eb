"""Which architectures are trusted: the self-test, what it says, and the table of all of them."""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, StableLmConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models import accepted_kinds
from gradprune.models.self_test import self_test
from gradprune.models.survey import cells, support

DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"


def test_an_architecture_that_scales_with_a_width_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) / self.intermediate_size**0.5

    # Values that no other test shrinks to, because results are kept.
    config = LlamaConfig(rms_norm_eps=1.25e-5)
    monkeypatch.setattr(LlamaMLP, "forward", scaled)
    found = self_test(config)
    assert found.accepted == ("attention",)
    assert found.refused == {
        "mlp": "masking a group is not cutting it: something depends on the block's width",
    }


def test_what_the_self_test_found_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="gradprune"):
        assert accepted_kinds(StableLmConfig()) == ("attention", "mlp")
        assert accepted_kinds(StableLmConfig(num_hidden_layers=3)) == ("attention", "mlp")
    lines = [record.message for record in caplog.records if "stablelm" in record.message]
    assert lines == [
        "architecture 'stablelm' is not on the tested list; its self-test passed for attention and mlp "
        "(masked = cut on a tiny random model)"
    ]


def test_an_option_that_changes_the_architecture_is_tested_too() -> None:
    found = self_test(StableLmConfig(qk_layernorm=True))
    assert found.accepted == ("mlp",)
    assert "attention" in found.refused


def test_a_refusal_says_what_failed() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"'gpt2' .* refused it: .*; tested are .*llama"):
        accepted_kinds(GPT2Config())


@pytest.mark.parametrize("architecture", ["llama", "olmo2", "stablelm", "gpt2"])
def test_the_table_of_the_docs_is_current(architecture: str) -> None:
    row = f"| {' | '.join(cells(support(architecture)))} |"
    assert row in DOCS.read_text(encoding="utf-8").splitlines()


def test_the_command_lists_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from gradprune import cli

    heads = {"AutoModelForCausalLM": {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}}
    monkeypatch.setattr("gradprune.models.survey.HEADS", heads)
    cli.info(as_json=True, architectures=True)
    found = {entry["architecture"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["llama"]["status"] == "tested"
    assert found["llama"]["pruned"] == ["attention", "mlp"]
    assert found["gpt2"]["status"] == "refused"
    assert found["gpt2"]["whole"]
