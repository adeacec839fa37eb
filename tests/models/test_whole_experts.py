"""Whole experts: their importances, cutting them together with their rows of the router, and whole runs."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, HunYuanMoEV1Config, LlamaConfig

from gradprune import ImportanceEngine, PruneConfig, load_pruned
from gradprune.checkpoint.save import save_checkpoint
from gradprune.cli import main
from gradprune.config import Constraints
from gradprune.demo.model import byte_tokenizer
from gradprune.errors import ConfigError, SelectionError
from gradprune.models import describe
from gradprune.models.masks import GroupMasks
from gradprune.models.self_test import self_test
from gradprune.models.tested import TESTED
from gradprune.scoring.selection import select
from gradprune.scoring.table import empty_table
from gradprune.surgery.cut import cut
from gradprune.surgery.masking import masked
from helpers.commands import QUICK
from helpers.mixtures import EXPERTS, MIXTURES, WITH_SHARED, assert_cut_as, down_columns, experts_of, tiny_mixture
from helpers.pipeline_runs import run
from helpers.routing import route, routed, router_of, without_experts
from helpers.tiny_models import tiny_ids, tiny_model

# Routers compute in fp32, and the cut model's routers multiply other rows together.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
METHODS = ("taylor", "fisher", "group_fisher")
ALL = (*MIXTURES, *WITH_SHARED)


def scored(model, ids, batch_size: int = 2, method: str = "taylor_2nd", **options) -> dict[str, list[torch.Tensor]]:
    """By method, each layer's importances of the experts."""
    with ImportanceEngine(model, method, backend="reference", kinds=["experts"], **options) as engine:
        for part in ids.split(batch_size):
            engine.step(part)
    evidence = engine.evidence()
    blocks = describe(model, ["experts"]).blocks
    found = {method: evidence.scores(method).importance for method in evidence.methods}
    return {method: [importance[block].double() for block in blocks] for method, importance in found.items()}


def expert_importances(model, ids) -> dict[str, list[torch.Tensor]]:
    """By method, each layer's expert importances [E], from autograd's gradients of every sample's loss."""
    layers = model.model.layers
    found = {method: [torch.zeros(len(layer.mlp.experts.down_proj)).double() for layer in layers] for method in METHODS}
    for sample in ids.split(1):
        logits = model(input_ids=sample, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten())
        for number, layer in enumerate(layers):
            module, router = layer.mlp.experts, router_of(layer)
            weights = [module.gate_up_proj, module.down_proj, router.weight]
            biases = [module.down_proj_bias] if module.has_bias else []
            gradients = torch.autograd.grad(loss, weights + biases, retain_graph=True)
            products = [(w * g).detach().flatten(1) for w, g in zip(weights + biases, gradients, strict=True)]
            found["taylor"][number] += sum(each.abs().sum(1) for each in products[:3]) / len(ids)
            found["fisher"][number] += 0.5 * sum(each.square().sum(1) for each in products[:3]) / len(ids)
            of_output = sum(each.sum(1) for each in products[1:2] + products[3:])
            found["group_fisher"][number] += of_output.square() / len(ids)
    return found


def reap(model, ids) -> list[torch.Tensor]:
    """Each layer's `reap` importances [E]: the mean, over an expert's tokens, of its factor times its output's norm."""
    entered: list[torch.Tensor] = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _module, args: entered.append(args[0].flatten(0, 1)))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    for layer, x in zip(model.model.layers, entered, strict=True):
        module, count = layer.mlp.experts, len(layer.mlp.experts.down_proj)
        factors, chosen = route(model.config, router_of(layer), x, torch.ones(count, dtype=torch.bool))
        of_experts = torch.zeros(count).double()
        for expert in range(count):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            if len(token):
                alone = torch.full((len(token), 1), expert)
                written = module(x[token], alone, torch.ones(len(token), 1).double())
                of_experts[expert] = (factors[token, slot] * written.norm(dim=1)).mean()
        found.append(of_experts)
    return found


def expert_masks(model, keep: int, seed: int = 0) -> GroupMasks:
    """Masks that keep `keep` random experts of each layer, the same number from each of the router's sets."""
    generator, masks = torch.Generator().manual_seed(seed), {}
    for block in describe(model, ["experts"]).blocks:
        drawn = torch.rand(block.sets, block.groups // block.sets, generator=generator).argsort(1).argsort(1)
        masks[block.key] = (drawn < keep // block.sets).flatten()
    return GroupMasks(masks, len(model.model.layers))


def assert_importances_equal(found, expected) -> None:
    for method in expected:
        for of_layer, exact in zip(found[method], expected[method], strict=True):
            torch.testing.assert_close(of_layer, exact, rtol=1e-5, atol=1e-14)


def test_every_mixture_on_the_tested_list_is_tested_here() -> None:
    assert {name for name, kinds in TESTED.items() if "experts" in kinds} == set(ALL)


@pytest.mark.parametrize("architecture", ALL)
def test_importances_equal_fp64_autograd(architecture: str) -> None:
    model, ids = tiny_mixture(architecture), tiny_ids(3)
    with torch.no_grad():
        down_columns(experts_of(model)[1])[2] = 0.0
        if experts_of(model)[1].has_bias:
            experts_of(model)[1].down_proj_bias[2] = 0.0
    found = scored(model, ids)
    assert_importances_equal(found, {**expert_importances(model, ids), "reap": reap(model, ids)})
    assert found["group_fisher"][1][2] == found["reap"][1][2] == 0.0
    assert found["reap"][1].argmin() == found["taylor"][1].argmin() == 2


@pytest.mark.parametrize("top_k", [1, EXPERTS])
def test_importances_are_exact_for_any_number_of_experts_per_token(top_k: int) -> None:
    model, ids = tiny_mixture(top_k=top_k), tiny_ids(3)
    assert_importances_equal(scored(model, ids), {**expert_importances(model, ids), "reap": reap(model, ids)})


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_experts_that_see_all_tokens_one_token_or_none(architecture: str) -> None:
    model, ids = tiny_mixture(architecture), tiny_ids(2, 5)
    # One token of each sample is routed to expert 1, and none to expert 3.
    chosen = torch.tensor([[0, 2]] * 5)
    chosen[3] = torch.tensor([0, 1])
    with routed(model, chosen):
        found, expected = scored(model, ids, batch_size=1), expert_importances(model, ids)
    assert_importances_equal(found, expected)
    for method in ("group_fisher", "wanda", "reap"):
        for of_layer in found[method]:
            assert of_layer[3] == 0.0
            assert (of_layer[:3] > 0.0).all()


@pytest.mark.parametrize("method", ["reap", "taylor_2nd"])
def test_reap_does_not_depend_on_batches_or_recomputation(method: str) -> None:
    model, ids = tiny_mixture(), tiny_ids(5)
    alone = scored(model, ids, 1, method)
    # The first step computes weight gradients, the others only what the method needs.
    options = {"use_gradient_checkpointing": True, "weight_gradient_steps": 1}
    for batch_size in (1, 2, 5):
        assert_importances_equal(scored(model, ids, batch_size, method, **options), {"reap": alone["reap"]})


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("keep", [2, 3])
def test_cutting_equals_rerouting_and_gives_a_plain_checkpoint(architecture: str, keep: int, tmp_path: Path) -> None:
    model, ids = tiny_mixture(architecture), tiny_ids(2)
    masks = expert_masks(model, keep)
    rerouted = without_experts(model, masks)
    with torch.no_grad(), masked(describe(model, ["experts"]), masks):
        torch.testing.assert_close(model(ids).logits, rerouted(ids).logits, **TOLERANCE)
    pruned = cut(model, masks)
    stock = assert_cut_as(rerouted, model, pruned, ids, tmp_path / "x", TOLERANCE)
    assert {len(module.down_proj) for module in experts_of(stock)} == {keep}
    # The number of removed parameters is the sum of the groups' costs.
    costs = sum(block.cost for block in describe(model, ["experts"]).blocks)
    assert model.num_parameters() - pruned.num_parameters() == (EXPERTS - keep) * costs


def test_masking_leaves_the_model_unchanged() -> None:
    model, ids = tiny_mixture("deepseek_v3"), tiny_ids(2)
    with torch.no_grad():
        before = model(ids).logits
        with masked(describe(model, ["experts"]), expert_masks(model, 2)):
            assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3"])
def test_every_set_of_a_routers_experts_keeps_the_same_number(architecture: str) -> None:
    method = {"topk_method": "group_limited_greedy"} if architecture == "deepseek_v2" else {}
    model, ids = tiny_mixture(architecture, n_routed_experts=8, n_group=2, topk_group=1, **method), tiny_ids(3)
    masks = expert_masks(model, 4)
    with torch.no_grad():
        expected = without_experts(model, masks)(ids).logits
        torch.testing.assert_close(cut(model, masks)(ids).logits, expected, **TOLERANCE)
    for key in masks:
        masks[key][:] = torch.arange(8) < 4
    with pytest.raises(ValueError, match="layer 0 keeps 0 to 4 experts of each of the router's 2 sets"):
        cut(model, masks)
    assert_importances_equal(scored(model, ids), expert_importances(model, ids))


def test_layers_that_keep_different_numbers_of_experts_survive_saving(tmp_path: Path) -> None:
    model, ids = tiny_mixture(), tiny_ids(2)
    masks, more = expert_masks(model, 2), expert_masks(model, 3)
    for key in masks:
        if key.layer == 1:
            masks[key][:] = more[key]
    save_checkpoint(cut(model, masks), None, tmp_path / "x")
    found = load_pruned(tmp_path / "x")
    found.set_experts_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, without_experts(model, masks)(ids).logits, **TOLERANCE)


def test_experts_and_their_channels_are_cut_together() -> None:
    model, ids = tiny_mixture(), tiny_ids(2)
    whole = expert_masks(model, 3)
    channels = {block.key: torch.arange(block.groups) % 3 > 0 for block in describe(model, ["expert_channels"]).blocks}
    both = cut(model, GroupMasks({key: whole[key] for key in whole} | channels, 2))
    one_by_one = cut(model, whole)
    blocks = describe(one_by_one, ["expert_channels"]).blocks
    narrower = {block.key: torch.arange(block.groups) % 3 > 0 for block in blocks}
    with torch.no_grad():
        expected = cut(one_by_one, GroupMasks(narrower, 2))(ids).logits
        assert torch.equal(both(ids).logits, expected)


def test_fewer_experts_than_a_token_is_routed_to_are_refused() -> None:
    model = tiny_mixture(top_k=3)
    with pytest.raises(ValueError, match=r"layer 0 keeps 2 to 2 experts; .* at least 3"):
        cut(model, expert_masks(model, 2))
    table = empty_table(describe(model, ["experts"]))
    lost = table.cost[0] * 2
    pruned = select(table, lost / 10_000, 10_000, Constraints())
    assert pruned.reshape(2, EXPERTS).sum(1).tolist() == [1, 1]
    with pytest.raises(SelectionError, match="cannot be reached"):
        select(table, 2 * lost / 10_000, 10_000, Constraints())


@pytest.mark.parametrize("method", ["group_fisher", "taylor_2nd", "wanda", "magnitude", "reap"])
def test_a_whole_run_keeps_the_same_number_of_experts_in_every_layer(method: str, tmp_path: Path) -> None:
    model, kinds = tiny_mixture(), "experts" if method == "reap" else "attention,experts"
    result = run(
        model, pruning_ratio=0.3, importance_method=method, prune_kinds=kinds, output_dir=str(tmp_path), output_name="x"
    )
    assert result.model.config.num_experts in (2, 3)
    assert type(result.model) is type(model)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "x" / "model", experts_implementation="eager")
    ids = tiny_ids(2)
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, result.model(ids).logits, **TOLERANCE)
    again = run(model, pruning_ratio=0.2, importance_method=method, prune_kinds=kinds,
                evidence_file=str(tmp_path / "x" / "analysis" / "evidence.safetensors"))  # fmt: skip
    assert again.evidence.methods == result.evidence.methods
    card = (tmp_path / "x" / "model" / "README.md").read_text()
    assert f"removed the {'experts' if method == 'reap' else 'KV groups and experts'} with the lowest" in card
    with pytest.raises(ConfigError, match=f"prune_kinds: evidence_file .* scored {kinds.replace(',', ', ')};"):
        run(model, evidence_file=str(tmp_path / "x" / "analysis" / "evidence.safetensors"))


@pytest.mark.parametrize("architecture", ["deepseek_v3", "glm4_moe"])
def test_priors_and_search_support_whole_experts(architecture: str) -> None:
    result = run(
        tiny_mixture(architecture),
        pruning_ratio=0.2,
        importance_method="auto",
        prune_kinds="experts",
        prior="similarity",
        search_minutes=0.02,
    )
    assert "reap" in result.evidence.methods
    assert result.search is not None
    assert "reap" in {trial.scoring.importance_method for trial in result.search.trials}
    assert result.search.default.scoring.importance_method == "group_fisher"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_kinds": "experts,expert_channels"}, "names whole experts and their channels"),
        ({"prune_kinds": "experts,heads"}, "prune_kinds: 'heads' is unknown; give one or several of attention, mlp"),
        ({"prune_kinds": "mlp,mlp"}, "prune_kinds: 'mlp,mlp' names one of them twice"),
        ({"importance_method": "reap"}, "importance_method: 'reap' scores whole experts and nothing else; add"),
        ({"importance_method": "reap", "prune_kinds": "attention,experts"}, "importance_method: 'reap'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneConfig(**options)


def test_kinds_that_a_model_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"prune_kinds: this model, a llama, has no experts .* it has attention, mlp"):
        run(tiny_model(), prune_kinds="experts", importance_method="reap")
    with pytest.raises(ConfigError, match="'reap' scores whole experts only, not attention, mlp;"):
        ImportanceEngine(tiny_model(), "reap")
    with pytest.raises(ConfigError, match="'reap' scores whole experts only, not attention;"):
        ImportanceEngine(tiny_mixture(), "reap", kinds=["attention", "experts"])


def test_only_the_kinds_that_are_named_are_pruned() -> None:
    model = tiny_model(channels=12)
    result = run(model, prune_kinds="mlp")
    assert {key.kind for key in result.masks} == {"mlp"}
    assert result.model.config.num_attention_heads == model.config.num_attention_heads


def test_a_router_of_two_modules_is_found() -> None:
    assert "experts" in self_test(HunYuanMoEV1Config(num_hidden_layers=2, num_experts=8, moe_topk=2)).accepted
    assert "experts" not in self_test(LlamaConfig()).accepted


def test_the_command_line_prunes_whole_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_mixture(vocab_size=300).float()
    save_checkpoint(model, byte_tokenizer(), tmp_path / "dense")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 61, 3000))
    arguments = [
        "prune", "--base_model", tmp_path / "dense", "--dataset", tmp_path / "ids.npy", "--output_dir", tmp_path,
        "--output_name", "out", "--pruning_ratio", "0.2", "--prune_kinds", "experts", "--importance_method", "reap",
        "--no_generations", *QUICK,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gradprune", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert not exit_info.value.code, capsys.readouterr().err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert type(loaded) is type(model)
    assert loaded.config.num_experts < EXPERTS
    assert loaded(tiny_ids(2)).logits.isfinite().all()
