"""Shared experts: MLPs that process every token, often as wide as a multiple of the routed experts beside them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from gradprune import ImportanceEngine
from gradprune.checkpoint.save import save_checkpoint
from gradprune.config import Constraints
from gradprune.errors import ConfigError
from gradprune.models import describe
from gradprune.models.masks import GroupMasks
from gradprune.models.tested import TESTED
from gradprune.scoring.selection import select
from gradprune.scoring.table import empty_table
from gradprune.surgery.cut import cut
from gradprune.surgery.masking import masked
from helpers.mixtures import CHANNELS, EXPERTS, WITH_SHARED, down_columns, experts_of, tiny_mixture
from helpers.pipeline_runs import run
from helpers.tiny_models import tiny_ids

# Routers compute in fp32.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def shared_of(layer):
    return layer.mlp.shared_expert if hasattr(layer.mlp, "shared_expert") else layer.mlp.shared_experts


def without_every_third_group(model) -> GroupMasks:
    blocks = describe(model, ["expert_channels", "shared_experts"]).blocks
    masks = {block.key: torch.arange(block.groups) % 3 > 0 for block in blocks}
    return GroupMasks(masks, len(model.model.layers))


def test_every_mixture_with_shared_experts_on_the_tested_list_is_tested_here() -> None:
    assert {name for name, kinds in TESTED.items() if "shared_experts" in kinds} == set(WITH_SHARED)


@pytest.mark.parametrize("architecture", WITH_SHARED)
def test_importances_equal_fp64_autograd(architecture: str) -> None:
    model, ids = tiny_mixture(architecture), tiny_ids(3)
    kinds = ["expert_channels", "shared_experts"]
    with ImportanceEngine(model, "taylor_2nd", backend="reference", kinds=kinds) as engine:
        engine.step(ids)
    found = engine.evidence().scores("group_fisher").importance
    layers = model.model.layers
    expected = [torch.zeros(len(found[block])).double() for block in describe(model, kinds).blocks]
    for sample in ids.split(1):
        logits = model(input_ids=sample, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten())
        weights = [w for layer in layers for w in (layer.mlp.experts.down_proj, shared_of(layer).down_proj.weight)]
        gradients = torch.autograd.grad(loss, weights)
        for total, w, g in zip(expected, weights, gradients, strict=True):
            total += (w * g).detach().sum(-2).flatten().square() / len(ids)
    for block, exact in zip(describe(model, kinds).blocks, expected, strict=True):
        torch.testing.assert_close(found[block].double(), exact, rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("architecture", WITH_SHARED)
def test_cutting_equals_masking_and_gives_a_plain_checkpoint(architecture: str, shared: int, tmp_path: Path) -> None:
    name = "shared_expert_intermediate_size" if architecture == "qwen2_moe" else "n_shared_experts"
    options = {name: 9 * shared if architecture == "qwen2_moe" else shared}
    model, ids = tiny_mixture(architecture, **options), tiny_ids(2)
    masks = without_every_third_group(model)
    with torch.no_grad():
        before = model(ids).logits
        with masked(describe(model, ["expert_channels", "shared_experts"]), masks):
            expected = model(ids).logits
        assert not torch.allclose(before, expected)
        save_checkpoint(cut(model, masks), None, tmp_path / "x")
        assert not list((tmp_path / "x").glob("*.py"))
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "x", experts_implementation="eager").eval()
        torch.testing.assert_close(stock(ids).logits, expected, **TOLERANCE)
    widths = {shared_of(layer).down_proj.in_features for layer in stock.model.layers}
    assert widths == {2 * shared_of(model.model.layers[0]).down_proj.in_features // 3}


@pytest.mark.parametrize("shared", [1, 2])
def test_shared_experts_lose_a_multiple_of_the_routed_experts_channels(shared: int) -> None:
    table = empty_table(describe(tiny_mixture("deepseek_v3", n_shared_experts=shared)))
    table.score[:] = torch.rand(len(table), generator=torch.Generator().manual_seed(0)).numpy()
    pruned = select(table, 0.4, 12_000, Constraints())
    for key, rows in table.blocks():
        sets = EXPERTS if key.kind == "expert_channels" else 1
        for gone, score in zip(*(each[rows].reshape(sets, -1) for each in (pruned, table.score)), strict=True):
            assert gone.sum() == (8 if sets > 1 else 8 * shared)
            assert score[gone].max() < score[~gone].min()


@pytest.mark.parametrize("architecture", WITH_SHARED)
def test_a_whole_run_repairs_shared_experts(architecture: str, tmp_path: Path) -> None:
    model = tiny_mixture(architecture)
    kinds = "expert_channels,shared_experts"
    result = run(
        model, pruning_ratio=0.3, temperature=1.0, prune_kinds=kinds, output_dir=str(tmp_path), output_name="x"
    )
    assert type(result.model) is type(model)
    assert experts_of(result.model)[0].down_proj.shape[2] < CHANNELS
    assert "shared_experts" in {repair.kind for repair in result.repairs}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "x" / "model", experts_implementation="eager")
    ids = tiny_ids(2)
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, result.model(ids).logits, **TOLERANCE)


def test_dead_channels_are_removed_first() -> None:
    model = tiny_mixture("glm4_moe")
    dead = np.arange(0, CHANNELS, 3)
    with torch.no_grad():
        for layer in model.model.layers:
            shared_of(layer).down_proj.weight[:, dead] = 0.0
            down_columns(layer.mlp.experts)[:, dead] = 0.0
    result = run(model, pruning_ratio=0.2, prune_kinds="expert_channels,shared_experts", repair="none")
    assert result.after.perplexity.value == pytest.approx(result.before.perplexity.value, rel=1e-6)


@pytest.mark.parametrize("kinds", ["attention,expert_channels", "shared_experts", "shared_experts,experts"])
def test_widths_that_the_configuration_states_together_are_pruned_together(kinds: str) -> None:
    with pytest.raises(ConfigError, match=r"prune_kinds: .* name expert_channels and shared_experts, or neither"):
        run(tiny_mixture("glm4_moe"), prune_kinds=kinds)
    if "attention" not in kinds:
        assert run(tiny_mixture("qwen2_moe"), prune_kinds=kinds, pruning_ratio=0.02).after.parameters > 0


def test_a_shared_expert_has_to_keep_a_channel() -> None:
    model = tiny_mixture("glm4_moe")
    masks = without_every_third_group(model)
    for key in masks:
        if key.kind == "shared_experts":
            masks[key][:] = False
    with pytest.raises(ValueError, match="layer 0 keeps no shared experts' channels"):
        cut(model, masks)
