"""Which architectures are accepted: the self-test, what it reports, and the table of all architectures."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from transformers import CTRLConfig, FalconConfig, LlamaConfig, Olmo2Config, OlmoHybridConfig, StableLmConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from gradprune.errors import UnsupportedArchitectureError
from gradprune.models import accepted_kinds
from gradprune.models.modeling_gradprune import CLASSES_BY_AUTO, auto_class, class_names
from gradprune.models.self_test import self_test
from gradprune.models.survey import cells, support

DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"


def test_an_architecture_that_divides_by_a_width_fails_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) / self.intermediate_size**0.5

    # A configuration that no other test uses, because the self-test's results are cached.
    config = LlamaConfig(rms_norm_eps=1.25e-5)
    monkeypatch.setattr(LlamaMLP, "forward", scaled)
    found = self_test(config)
    assert found.accepted == ("attention",)
    assert found.refused == {
        "mlp": "masking a group differs from cutting it: something depends on the block's width",
    }


def test_the_result_of_a_self_test_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="gradprune"):
        assert accepted_kinds(StableLmConfig()) == ("attention", "mlp")
        assert accepted_kinds(StableLmConfig(num_hidden_layers=3)) == ("attention", "mlp")
    lines = [record.message for record in caplog.records if "stablelm" in record.message]
    assert lines == [
        "architecture 'stablelm' is not on the tested list; its self-test passed for attention and mlp "
        "(masked = cut on a tiny random model)"
    ]


def test_kinds_that_a_tested_architecture_leaves_whole_are_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["gradprune.models.describe"], "_LOGGED", set())
    with caplog.at_level(logging.WARNING, logger="gradprune"):
        for _ in range(2):
            assert accepted_kinds(Olmo2Config()) == ("mlp",)
        assert accepted_kinds(LlamaConfig()) == ("attention", "mlp")
    assert caplog.messages == [
        "architecture 'olmo2': attention is left whole: its norms of queries and keys span all heads, so removing a "
        "head would change them"
    ]


def test_heads_that_differ_by_a_bias_are_left_whole() -> None:
    rotary, biased = FalconConfig(multi_query=False), FalconConfig(multi_query=False, alibi=True)
    for config in (rotary, FalconConfig(), FalconConfig(new_decoder_architecture=True, num_kv_heads=8)):
        assert self_test(config).accepted == ("attention", "mlp")
    found = self_test(biased)
    assert found.accepted == ("mlp",)
    assert "alibi" in found.refused["attention"]


def test_an_option_that_changes_the_architecture_is_tested_too() -> None:
    found = self_test(StableLmConfig(qk_layernorm=True))
    assert found.accepted == ("mlp",)
    assert "attention" in found.refused


def test_attention_that_few_layers_have_is_cut_in_part_too() -> None:
    """The norms of queries and keys span all heads, which removing the whole block would not show."""
    types = ["linear_attention"] * 3 + ["full_attention"]
    found = self_test(OlmoHybridConfig(num_hidden_layers=8, layer_types=types * 2))
    assert found.accepted == ("mlp",)
    assert "size of tensor" in found.refused["attention"]


@pytest.mark.parametrize("architecture", sorted(set().union(*CLASSES_BY_AUTO.values())))
def test_model_and_configuration_of_a_pruned_checkpoint_belong_together(architecture: str) -> None:
    """Transformers compares them by name, and some architectures use the model class of another architecture."""
    names = class_names(architecture)
    config = auto_class(architecture, "AutoConfig")
    for auto in names.keys() - {"AutoConfig"}:
        model = auto_class(architecture, auto)
        assert model.config_class.__name__ == config.__name__
        assert getattr(sys.modules[model.__module__], model.__name__) is model


def test_a_refusal_says_what_failed() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"'ctrl' .* refused it: .*; tested are .*llama"):
        accepted_kinds(CTRLConfig())


@pytest.mark.parametrize("architecture", ["llama", "olmo2", "stablelm", "ctrl", "internvl", "olmo_hybrid"])
def test_the_table_of_the_docs_is_current(architecture: str) -> None:
    row = f"| {' | '.join(cells(support(architecture)))} |"
    assert row in DOCS.read_text(encoding="utf-8").splitlines()


def test_the_info_command_lists_the_architectures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gradprune import cli

    heads = {"AutoModelForCausalLM": {"llama": "LlamaForCausalLM", "ctrl": "CTRLLMHeadModel"}}
    monkeypatch.setattr("gradprune.models.survey.CLASSES_BY_AUTO", heads)
    cli.info(as_json=True, architectures=True)
    found = {entry["architecture"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["llama"]["status"] == "tested"
    assert found["llama"]["pruned"] == ["attention", "mlp"]
    assert found["ctrl"]["status"] == "refused"
    assert found["ctrl"]["whole"]
