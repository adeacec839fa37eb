"""Mixtures of experts: importances of expert channels, cutting them, and whole runs."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from gradprune import ImportanceEngine, load_pruned
from gradprune.checkpoint.save import save_checkpoint
from gradprune.cli import main
from gradprune.config import Constraints
from gradprune.demo.model import byte_tokenizer
from gradprune.errors import ConfigError, ExportError
from gradprune.export.gguf_model import check_config
from gradprune.models import describe
from gradprune.models.masks import GroupMasks
from gradprune.models.tested import TESTED
from gradprune.scoring.selection import check_reachable, select
from gradprune.scoring.table import empty_table
from gradprune.surgery.cut import cut
from helpers.commands import QUICK
from helpers.cut_models import TOLERANCE
from helpers.mixtures import (
    CHANNELS,
    EXPERTS,
    MIXTURES,
    assert_cut_as,
    channel_importances,
    down_columns,
    experts_of,
    tiny_mixture,
    without_channels,
)
from helpers.pipeline_runs import run
from helpers.routing import routed
from helpers.tiny_models import tiny_ids

METHODS = ("taylor", "fisher", "group_fisher")


def scored(model, ids, batch_size: int = 2, **options) -> dict[str, list[torch.Tensor]]:
    """By method, each layer's importances of the expert channels."""
    with ImportanceEngine(model, "taylor_2nd", backend="reference", **options) as engine:
        for part in ids.split(batch_size):
            engine.step(part)
    evidence = engine.evidence()
    blocks = [block for block in describe(model).blocks if block.kind.name == "expert_channels"]
    found = {method: evidence.scores(method, "none").importance for method in (*METHODS, "wanda", "magnitude")}
    return {method: [importance[block].double() for block in blocks] for method, importance in found.items()}


def equal_masks(model, keep: int, seed: int = 0) -> GroupMasks:
    """Masks that keep `keep` random channels of each expert, and the first KV head of each attention block."""
    generator, masks = torch.Generator().manual_seed(seed), {}
    for block in describe(model).blocks:
        if block.kind.name == "expert_channels":
            drawn = torch.rand(EXPERTS, CHANNELS, generator=generator).argsort(1).argsort(1)
            masks[block.key] = (drawn < keep).flatten()
        else:
            masks[block.key] = torch.arange(block.groups) < 1
    return GroupMasks(masks, len(model.model.layers))


def assert_importances_equal(found, expected) -> None:
    for method in METHODS:
        for of_layer, exact in zip(found[method], expected[method], strict=True):
            torch.testing.assert_close(of_layer, exact, rtol=1e-5, atol=1e-14)


def test_every_mixture_on_the_tested_list_is_tested_here() -> None:
    assert {name for name, kinds in TESTED.items() if kinds[-1] == "experts"} == set(MIXTURES)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_importances_equal_fp64_autograd(architecture: str) -> None:
    model, ids = tiny_mixture(architecture), tiny_ids(3)
    with torch.no_grad():
        down_columns(experts_of(model)[1])[:, -1] = 0.0
    found = scored(model, ids)
    assert_importances_equal(found, channel_importances(model, ids))
    dead = torch.arange(EXPERTS) * CHANNELS + CHANNELS - 1
    assert (found["group_fisher"][1][dead] == 0.0).all()


@pytest.mark.parametrize("top_k", [1, EXPERTS])
def test_importances_are_exact_for_any_number_of_experts_per_token(top_k: int) -> None:
    model, ids = tiny_mixture(top_k=top_k), tiny_ids(3)
    assert_importances_equal(scored(model, ids), channel_importances(model, ids))


def test_many_experts_per_token_give_the_same_bits_every_time(device: str, restore_threads: None) -> None:
    """A token's terms are added in the order of its experts; 480 tokens are enough for several threads to be used."""
    model, ids = tiny_mixture(top_k=EXPERTS, hidden_size=128).float().to(device), tiny_ids(8, 60)
    torch.set_num_threads(2)
    runs = [scored(model, ids, 8)["taylor"] for _ in range(3)]
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


def test_experts_that_see_all_tokens_one_token_or_none() -> None:
    model, ids = tiny_mixture(), tiny_ids(2, 5)
    # One token of each sample is routed to expert 1, and none to expert 3.
    chosen = torch.tensor([[0, 2]] * 5)
    chosen[3] = torch.tensor([0, 1])
    with routed(model, chosen):
        found, expected = scored(model, ids, batch_size=1), channel_importances(model, ids)
        with ImportanceEngine(model, "taylor_2nd", backend="reference") as engine:
            engine.step(ids[:1])
    assert_importances_equal(found, expected)
    # The gradient of an expert without tokens is zero, and is included in the statistics.
    assert [layer.minimum for layer in engine.gradients()] == [0.0, 0.0]
    for of_layer in found["wanda"] + found["taylor"]:
        by_expert = of_layer.view(EXPERTS, CHANNELS).sum(1)
        assert by_expert[3] == 0.0
        assert (by_expert[:3] > 0.0).all()


def test_a_token_belongs_to_its_sample_however_samples_are_batched() -> None:
    model, ids = tiny_mixture(), tiny_ids(5)
    alone = scored(model, ids, batch_size=1)
    for batch_size, options in ((5, {}), (2, {"use_gradient_checkpointing": True})):
        assert_importances_equal(scored(model, ids, batch_size, **options), alone)


def test_recomputed_layers_count_their_tokens_once() -> None:
    """One pass with gradients serves every method, including "wanda", which averages over tokens."""
    found = []
    for recomputed in (False, True):
        with ImportanceEngine(
            tiny_mixture(), "taylor", backend="reference", use_gradient_checkpointing=recomputed
        ) as engine:
            engine.step(tiny_ids(3))
        found.append(engine.scores("wanda").importance)
    for block in found[0]:
        torch.testing.assert_close(found[0][block], found[1][block])


def test_gradient_statistics_cover_all_experts() -> None:
    model, ids = tiny_mixture(), tiny_ids(2)
    with ImportanceEngine(model, "taylor_2nd", backend="reference") as engine:
        engine.step(ids)
    norm = engine.gradients()[0].parameter_norms["mlp.experts.down_proj"]
    squares = []
    for sample in ids.split(1):
        loss = model(input_ids=sample, labels=sample).loss
        (gradient,) = torch.autograd.grad(loss, [experts_of(model)[0].down_proj])
        squares.append(gradient.square().sum())
    assert norm == pytest.approx(float(torch.stack(squares).mean().sqrt()), rel=1e-6)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_cutting_equals_masking_and_gives_a_plain_checkpoint(architecture: str, tmp_path: Path) -> None:
    model, ids = tiny_mixture(architecture), tiny_ids(2)
    masks = equal_masks(model, 2)
    stock = assert_cut_as(without_channels(model, masks), model, cut(model, masks), ids, tmp_path / "x", TOLERANCE)
    assert {module.down_proj.numel() for module in experts_of(stock)} == {
        EXPERTS * 2 * model.config.hidden_size,
    }


def test_layers_of_different_widths_survive_saving(tmp_path: Path) -> None:
    model, ids = tiny_mixture(), tiny_ids(2)
    masks, wider = equal_masks(model, 2), equal_masks(model, 5)
    for key in masks:
        if key.layer == 1:
            masks[key][:] = wider[key]
    save_checkpoint(cut(model, masks), None, tmp_path / "x")
    # If a class supports this, its models may start with another implementation than "eager".
    assert type(model)._can_set_experts_implementation()
    found = load_pruned(tmp_path / "x")
    found.set_experts_implementation("eager")
    assert {layer.mlp.experts.config._experts_implementation for layer in found.model.layers} == {"eager"}
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, without_channels(model, masks)(ids).logits, **TOLERANCE)


def test_the_base_model_of_a_mixture_with_pruned_attention_loads_all_weights(tmp_path: Path) -> None:
    """The files hold each expert's weights; transformers merges these, except for classes of custom code."""
    model = tiny_mixture().float()
    masks = {block.key: torch.ones(block.groups, dtype=torch.bool) for block in describe(model).blocks}
    masks[describe(model, ["attention"]).blocks[0].key][0] = False
    pruned = cut(model, GroupMasks(masks, len(model.model.layers)))
    save_checkpoint(pruned, None, tmp_path / "model")
    body, about = AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=True, output_loading_info=True)
    assert not about["missing_keys"]
    ids = tiny_ids()
    with torch.no_grad():
        torch.testing.assert_close(body(ids).last_hidden_state, pruned.model(ids).last_hidden_state)


def test_experts_that_keep_different_numbers_of_channels_are_refused_before_anything_is_cut() -> None:
    model, ids = tiny_mixture(), tiny_ids(2)
    masks = equal_masks(model, 2)
    key = next(key for key in masks if key.kind == "expert_channels" and key.layer == 1)
    masks[key][:CHANNELS] = True
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(ValueError, match="experts of layer 1 keep 2 to 24 channels"):
            cut(model, masks, inplace=True)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("prior", ["removal", "similarity", "taylor"])
def test_a_whole_run_gives_equal_widths_everywhere(prior: str, tmp_path: Path) -> None:
    model = tiny_mixture()
    before = model.num_parameters()
    result = run(model, temperature=1.0, prior=prior, pruning_ratio=0.3, output_dir=str(tmp_path), output_name="out")
    assert 0.65 * before < result.model.num_parameters() < 0.9 * before
    assert type(result.model) is type(model)
    assert len({tuple(module.down_proj.shape) for module in experts_of(result.model)}) == 1
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", experts_implementation="eager")
    ids = tiny_ids(2)
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, result.model(ids).logits, **TOLERANCE)


def test_layers_with_and_without_experts_are_pruned_together() -> None:
    model = tiny_mixture(mlp_only_layers=[0], intermediate_size=10)
    result = run(model, pruning_ratio=0.3)
    assert {block.kind.name for block in describe(result.model).blocks} == {"attention", "mlp", "expert_channels"}
    assert type(result.model) is type(model)


def test_the_lowest_scoring_channels_of_every_expert_are_removed() -> None:
    table = empty_table(describe(tiny_mixture()))
    generator = torch.Generator().manual_seed(0)
    table.score[:] = torch.rand(len(table), generator=generator).numpy()
    pruned = select(table, 0.4, 12_000, Constraints())
    for key, rows in table.blocks():
        if key.kind == "expert_channels":
            for gone, score in zip(
                *(values[rows].reshape(EXPERTS, -1) for values in (pruned, table.score)), strict=True
            ):
                assert gone.sum() == 8  # because grouped matrix products require a multiple of 8
                assert score[gone].max() < score[~gone].min()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_method": "obs", "prune_kinds": "experts"}, "importance_method: 'obs' scores channels"),
        (
            {"importance_method": "obs", "prune_kinds": "experts", "evidence": "all"},
            "importance_method: 'obs' scores channels",
        ),
        ({"reduction": "batch"}, "reduction: 'batch'"),
        ({"epsilon": 0.5}, "epsilon: 0.5"),
        ({"freeze_first_n_layers": 1}, "^freeze_first_n_layers: 1 would"),
        ({"freeze_last_n_layers": 2}, "^freeze_last_n_layers: 2 would"),
    ],
)
def test_options_that_experts_do_not_support_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tiny_mixture(), **options)


@pytest.mark.parametrize("option", [{"epsilon": 0.1}, {"freeze_first_n_layers": 1}, {"freeze_last_n_layers": 1}])
def test_constraints_that_experts_do_not_support_are_refused_before_anything_is_scored(option) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(option))}: .* mixture of experts .*; leave it out"):
        check_reachable(empty_table(describe(tiny_mixture())), 0.1, 12_000, Constraints(**option))


def test_export_to_gguf_is_refused_by_the_configuration_alone() -> None:
    with pytest.raises(ExportError, match="no gguf file of the architecture 'qwen3_moe'"):
        check_config(tiny_mixture().config, alike=True)


def test_auto_searches_among_the_methods_that_support_experts() -> None:
    result = run(tiny_mixture(), pruning_ratio=0.3, importance_method="auto", search_minutes=0.02)
    assert result.search is not None
    assert "obs" in result.evidence.components


def test_the_command_line_prunes_expert_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_mixture(vocab_size=300).float()
    save_checkpoint(model, byte_tokenizer(), tmp_path / "dense")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 61, 3000))
    arguments = [
        "prune", "--base_model", tmp_path / "dense", "--dataset", tmp_path / "ids.npy", "--output_dir", tmp_path,
        "--output_name", "out", "--pruning_ratio", "0.3", "--no_generations", *QUICK,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gradprune", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert not exit_info.value.code, capsys.readouterr().err
    # The default implementation of experts supports only some widths.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert type(loaded) is type(model)
    assert loaded.num_parameters() < model.num_parameters()
    assert loaded(tiny_ids(2)).logits.isfinite().all()
    groups = (tmp_path / "out" / "analysis" / "groups.csv").read_text()
    assert groups.count("expert_channels") == 2 * EXPERTS * CHANNELS


def test_the_host_reads_the_tokens_per_expert_once_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted = tiny_mixture(), []
    bincount = torch.bincount
    # `bincount` reads the largest of its input values on the host.
    monkeypatch.setattr(
        torch, "bincount", lambda *given, **options: counted.append(given) or bincount(*given, **options)
    )
    with ImportanceEngine(model, "taylor", backend="reference") as engine:
        engine.step(tiny_ids())
    assert len(counted) == len(experts_of(model))
