"""The model card that is written beside every checkpoint's weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from gradprune import PruneConfig
from gradprune.checkpoint.load import load_model
from gradprune.checkpoint.save import save_checkpoint
from gradprune.config.recovery_config import RecoveryConfig
from gradprune.recovery.job import recover_checkpoint
from gradprune.report.card import write_card, write_recovered_card
from gradprune.report.rows import repair_text
from gradprune.surgery.cut import cut
from helpers.cut_models import full_masks
from helpers.pipeline_runs import TOKENS, run
from helpers.tiny_models import tiny_model

HEAD = "---\nlicense: other\nlicense_name: small\nlicense_link: LICENSE\nbase_model: someone/else\n---\n\n# Dense\n"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs on a dense model whose card begins with `HEAD`: uneven, plain, and with attention blocks removed."""
    folder = tmp_path_factory.mktemp("card")
    save_checkpoint(tiny_model(), None, folder / "secret" / "dense")
    (folder / "secret" / "dense" / "README.md").write_text(HEAD)
    usual = {"base_model": str(folder / "secret" / "dense"), "output_dir": str(folder)}
    run(tiny_model(), output_name="uneven", **usual)
    run(tiny_model(), output_name="plain", uniform=True, **usual)
    run(tiny_model(), output_name="without", attention_factor=1e-6, pruning_ratio=0.3, **usual)
    return folder


def card_of(results: Path, name: str = "uneven") -> ModelCard:
    return ModelCard.load(results / name / "model" / "README.md")


def card_with_head(results: Path, folder: Path, head: str) -> ModelCard:
    """The card of the first run, written again as if the dense model's card began with `head`."""
    (folder / "README.md").write_text(head)
    summary = json.loads((results / "uneven" / "analysis" / "summary.json").read_text())
    write_card(folder, tiny_model().config, PruneConfig(base_model=str(folder)), summary)
    return ModelCard.load(folder / "README.md")


def test_the_card_says_what_was_pruned_how_and_what_was_measured(results: Path) -> None:
    card = card_of(results)
    assert card.data.library_name == "transformers"
    assert "gradprune" in card.data.tags
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "small", "LICENSE")
    # The base model in the dense model's card is the dense model's, not this one's.
    assert card.data.base_model is None
    summary = json.loads((results / "uneven" / "analysis" / "summary.json").read_text())
    sizes = summary["parameters"]
    assert f"\n# dense pruned by {1.0 - sizes['after'] / sizes['before']:.1%}\n" in card.text
    # A block that is removed whole also loses its norm, which the budget of 20 % does not count.
    gone = [kind["kept"] == 0 for layer in summary["layers"] for kind in (layer["attention"], layer["mlp"])]
    norms = sum(gone) * tiny_model().config.hidden_size
    assert 0.15 < (sizes["before"] - sizes["after"] - norms) / sizes["before"] <= 0.2
    assert "| perplexity | " in card.text
    assert "`obs`" in card.text
    assert "gradprune prune --base_model dense --num_samples 8" in card.text
    assert "AutoModelForCausalLM.from_pretrained" in card.text
    assert "mlx_lm.generate" in card.text
    taught = summary["distillation"]
    samples = "predictions for 8 samples (10% of the loss is that of predicting the text itself)"
    told = f"from {taught['before']:.3f} to {taught['after']:.3f} nats per token"
    for text in (card.text, (results / "uneven" / "report.html").read_text()):
        assert "re-solved by least squares" in text
        assert (samples in text) == (told in text) == (taught["factor"] > 0.0)


def test_the_card_has_no_local_path_and_no_time(results: Path) -> None:
    text = str(card_of(results))
    assert str(results) not in text
    assert "secret" not in text
    assert "second" not in text


def test_a_plain_checkpoint_needs_no_remote_code(results: Path) -> None:
    assert "trust_remote_code=True" in card_of(results).text
    assert "trust_remote_code" not in card_of(results, "plain").text
    assert "A plain `llama` checkpoint" in card_of(results, "plain").text


def test_vllm_is_not_promised_without_attention(results: Path) -> None:
    assert "vllm serve" in card_of(results).text
    text = card_of(results, "without").text
    assert "vllm serve" not in text
    assert "vLLM cannot load it, because layer 2 has no attention block." in text


def test_several_layers_without_attention_are_all_named(results: Path, tmp_path: Path) -> None:
    model = tiny_model()
    masks = full_masks(model)
    for layer in (0, 2):
        masks.attention[layer][:] = False
    summary = json.loads((results / "uneven" / "analysis" / "summary.json").read_text())
    write_card(tmp_path, cut(model, masks).config, PruneConfig(), summary)
    assert "vLLM cannot load it, because layers 0, 2 have no attention block." in (tmp_path / "README.md").read_text()


def test_the_distilled_kinds_are_the_pruned_ones_except_routed_experts(results: Path) -> None:
    summary = json.loads((results / "uneven" / "analysis" / "summary.json").read_text())
    assert summary["distillation"]["factor"]
    assert " The kept KV groups and MLP channels were distilled from" in repair_text(summary)
    mixture = {"attention": {"groups": 2, "kept": 1}, "expert_channels": {"channels of experts": 8, "kept": 4}}
    assert " The kept KV groups were distilled from" in repair_text({**summary, "layers": [{"layer": 0, **mixture}]})


@pytest.mark.parametrize(
    ("architecture", "overrides", "loads"),
    [
        ("llama", {}, True),
        ("llama", {"hidden_act": "gelu"}, False),
        ("qwen3", {"tied": True}, True),
        ("qwen3", {"tied": False}, False),
    ],
)
def test_llama_cpp_is_named_only_if_the_model_can_be_exported(
    architecture: str, overrides: dict[str, Any], loads: bool, results: Path, tmp_path: Path
) -> None:
    model = tiny_model(architecture, **overrides)
    masks = full_masks(model)
    masks.mlp[0][0] = False
    summary = json.loads((results / "uneven" / "analysis" / "summary.json").read_text())
    write_card(tmp_path, cut(model, masks).config, PruneConfig(), summary)
    assert ("llama.cpp" in (tmp_path / "README.md").read_text()) is loads


@pytest.mark.parametrize(
    ("kind", "shown", "hidden"), [("attention", "KV groups", "MLP channels"), ("mlp", "MLP channels", "KV groups")]
)
def test_only_the_kinds_that_were_pruned_are_mentioned(kind: str, shown: str, hidden: str, results: Path) -> None:
    run(tiny_model(), pruning_ratio=0.05, prune_kinds=kind, output_dir=str(results), output_name=kind)
    card = card_of(results, kind).text
    assert f"removed the {shown} with the lowest" in card
    assert f"| layer | {shown} | kept |" in card
    assert hidden not in card
    report = (results / kind / "report.html").read_text()
    assert f"<th>{shown}</th>" in report
    assert f"<th>{hidden}</th>" not in report
    # summary.json lists both kinds, whichever was pruned.
    layers = json.loads((results / kind / "analysis" / "summary.json").read_text())["layers"]
    assert layers[0].keys() == {"layer", "attention", "mlp"}
    assert "removed the KV groups and MLP channels with the lowest" in card_of(results).text


@pytest.mark.parametrize("head", ["---\n: [\n---\n", "---\n- a\n---\n", "no head", "---\nlicense: 3\n---\n"])
def test_a_damaged_card_of_the_dense_model_is_ignored(results: Path, tmp_path: Path, head: str) -> None:
    assert card_with_head(results, tmp_path, head).data.license is None


def test_a_model_that_is_pruned_again_keeps_its_origin(results: Path, tmp_path: Path) -> None:
    head = HEAD.replace("license: other", "tags: [gradprune]\nlicense: mit")
    card = card_with_head(results, tmp_path, head)
    assert card.data.base_model == "someone/else"
    assert card.data.license == "mit"
    assert "--base_model someone/else" in card.text


def test_recovery_adds_to_the_card(results: Path, tmp_path: Path) -> None:
    before, folder = card_of(results), results / "uneven" / "model"
    model, _ = load_model(folder, dtype="float32")
    np.save(tmp_path / "ids.npy", TOKENS.numpy())
    places = PruneConfig(
        base_model=str(folder), dataset=str(tmp_path / "ids.npy"), output_dir=str(tmp_path), output_name="better"
    )
    config = RecoveryConfig(method="full", loss="lm", steps=2, seq_len=16, checks=1)
    recover_checkpoint(model, None, None, config, places)
    card = ModelCard.load(tmp_path / "better" / "model" / "README.md")
    assert card.data.to_dict() == before.data.to_dict()
    assert card.text.startswith(before.text.rstrip())
    assert "## Recovery" in card.text
    assert "all weights, to predict the text. The best weights, after" in card.text
    assert "of 2 steps (256 tokens in all), were kept." in card.text
    assert str(tmp_path) not in card.text


RECOVERED = {
    "perplexity": {"before": 3.0, "after": 2.0},
    **{"method": "lora", "loss": "kd", "steps": 8, "tokens": 64, "best_step": 5},
}


def test_recovery_of_a_model_that_was_never_pruned(results: Path, tmp_path: Path) -> None:
    dense = str(results / "secret" / "dense")
    write_recovered_card(tmp_path, tiny_model().config, dense, RECOVERED, str(results / "plain" / "model"))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["gradprune"]
    assert card.data.license_name == "small"
    assert card.text.startswith("\n# dense, trained further\n")
    assert "Trained by `gradprune recover`" in card.text
    assert "low-rank updates, merged into the weights, towards the predictions of plain. The best" in card.text
    assert "3.000 before, 2.000 after" in card.text
    # Training it further once more changes nothing in the head of its card.
    write_recovered_card(tmp_path, tiny_model().config, str(tmp_path), RECOVERED)
    again = ModelCard.load(tmp_path / "README.md")
    assert again.data.to_dict() == card.data.to_dict()
    assert again.text.count("Trained by `gradprune recover`") == 2
    assert "towards a teacher's predictions" in again.text


def test_recovery_of_a_pruned_model_without_a_card(results: Path, tmp_path: Path) -> None:
    config = load_model(results / "uneven" / "model")[0].config
    write_recovered_card(tmp_path, config, None, RECOVERED)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["gradprune", "pruned"]
    assert card.text.startswith("\n# A llama model, trained further\n")
    assert "Trained after pruning by `gradprune recover`" in card.text
