"""The peers of the quality benchmark compute what their papers define, according to NumPy in fp64."""

import copy
import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from benchmarks.quality.peers import PEERS, taking_part
from benchmarks.quality.peers.choice import PeerChoice, applied, uniform_counts
from benchmarks.quality.peers.flap import flap, fluctuation, standardised
from benchmarks.quality.peers.layerwise_obs import damped, layerwise_obs, surgeon
from benchmarks.quality.peers.llm_pruner import llm_pruner, middle_layers
from benchmarks.quality.peers.torch_pruning import torch_pruning_scores
from benchmarks.quality.peers.wanda_sp import wanda, wanda_sp
from gradprune.models import Block, BlockKey, PrunableModel, describe
from gradprune.models.masks import GroupMasks
from gradprune.surgery.cut import cut
from helpers.cut_models import random_masks
from helpers.mixtures import tiny_mixture
from helpers.tiny_models import tiny_ids, tiny_model

Array = NDArray[np.float64]

KV_HEADS, RATIO, HEAD_DIM = 3, 2, 4
IDS = tiny_ids(samples=5, tokens=9)
BATCHES = (IDS[:3], IDS[3:])


def model_and_view(layers: int = 3) -> tuple[PreTrainedModel, PrunableModel, int]:
    """Return a model, its view, and a budget of a third of its prunable parameters."""
    model = tiny_model(kv_heads=KV_HEADS, ratio=RATIO, head_dim=HEAD_DIM, layers=layers)
    view = describe(model)
    return model, view, sum(block.groups * block.cost for block in view.blocks) // 3


def inputs_of(model: PreTrainedModel, block: Block) -> Array:
    """Return the inputs of the block's output projection for all samples: [tokens, I]."""
    seen: list[torch.Tensor] = []
    hook = block.output.linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS, use_cache=False)
    hook.remove()
    return seen[0].flatten(0, 1).numpy()


def inputs_after(model: PreTrainedModel, view: PrunableModel, choice: PeerChoice, position: int) -> Array:
    """Return the inputs of the block at `position`, see `inputs_of`, with the blocks before it pruned."""
    before = [block.key for block in view.blocks[:position]]
    kept = {b.key: choice.masks[b] if b.key in before else torch.ones_like(choice.masks[b]) for b in view.blocks}
    weights = {key: weight for key, weight in choice.weights.items() if key in before}
    with applied(view, PeerChoice(GroupMasks(kept, len(view.layers)), weights)):
        return inputs_of(model, view.blocks[position])


def weight_of(block: Block) -> Array:
    return block.output.linear.weight.detach().numpy()


def columns_of(block: Block, group: int) -> list[int]:
    width = weight_of(block).shape[1] // block.groups
    return list(range(group * width, (group + 1) * width))


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_stays_within_the_budget_and_leaves_the_model_as_it_was(name: str) -> None:
    model, view, budget = model_and_view(layers=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    choice, again = PEERS[name](view, BATCHES, budget), PEERS[name](view, BATCHES, budget)
    removed = sum(int((~choice.masks[block]).sum()) * block.cost for block in view.blocks)
    assert 0.5 * budget < removed <= budget
    dense = model(IDS).logits
    with applied(view, choice):
        pruned = model(IDS).logits
    assert not torch.allclose(pruned, dense)
    torch.testing.assert_close(model(IDS).logits, dense, rtol=0.0, atol=0.0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(choice.masks[block], again.masks[block]) for block in view.blocks)


def with_plain_linears(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the model whose weights are stored as [O, I] instead of transposed."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if type(module).__name__ == "Conv1D":
            linear = nn.Linear(*module.weight.shape).to(module.weight.dtype)
            linear.load_state_dict({"weight": module.weight.T, "bias": module.bias})
            plain.set_submodule(name, linear)
    return plain


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_reads_weights_that_are_stored_transposed(name: str) -> None:
    torch.manual_seed(0)
    stored = GPT2Config(vocab_size=61, n_positions=16, n_embd=12, n_layer=3, n_head=3, initializer_range=0.2)
    model = GPT2LMHeadModel(stored).double().eval()
    views = describe(model), describe(with_plain_linears(model))
    found, expected = (PEERS[name](view, BATCHES, view.prunable // 3) for view in views)
    assert not all(found.masks[block].all() for block in views[0].blocks)
    assert all(torch.equal(found.masks[block], expected.masks[block]) for block in views[0].blocks)
    for have, want in ((found.biases, expected.biases), (found.weights, expected.weights)):
        assert have.keys() == want.keys()
        for key, value in have.items():
            torch.testing.assert_close(value, want[key], rtol=1e-10, atol=1e-12)
    with applied(views[0], found), applied(views[1], expected):
        torch.testing.assert_close(*(view.model(IDS).logits for view in views), rtol=1e-9, atol=1e-10)


def test_absent_peers_are_listed_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    view = describe(tiny_mixture())
    assert list(taking_part(PEERS, view)) == []
    reason = " takes no part: it prunes attention and mlp blocks, but the model's blocks are "
    assert capsys.readouterr().err.count(reason) == 4
    model = tiny_model()
    assert list(taking_part(PEERS, describe(model))) == [*PEERS]
    assert capsys.readouterr().err == ""
    unequal = describe(cut(model, random_masks(model, keep=0.6)))
    assert list(taking_part(PEERS, unequal)) == ["FLAP"]
    assert capsys.readouterr().err.count("but the model's layers differ") == 3


def test_torch_pruning_weighs_every_window_equally() -> None:
    pytest.importorskip("torch_pruning")
    model = tiny_model(kv_heads=3, ratio=1, layers=2)
    split, whole = (torch_pruning_scores(model, batches) for batches in (BATCHES, (IDS,)))
    assert len(BATCHES[0]) != len(BATCHES[1])
    for key, scores in split.items():
        torch.testing.assert_close(scores, whole[key], rtol=1e-9, atol=1e-12)


def test_column_scores() -> None:
    rng = np.random.default_rng(3)
    w, x = rng.normal(size=(4, 7)), rng.normal(size=(20, 7)) * np.arange(1, 8) + np.arange(7)[::-1] * 9.0
    given = torch.from_numpy(w), torch.from_numpy(x)
    variance = ((x - x.sum(0) / 20) ** 2).sum(0) / 19
    np.testing.assert_allclose(fluctuation(*given).numpy(), variance * (w**2).sum(0), rtol=1e-12)
    by_hand = [sum(abs(w[i, j]) * np.sqrt(sum(x[:, j] ** 2)) for i in range(4)) for j in range(7)]
    np.testing.assert_allclose(wanda(*given).numpy(), by_hand, rtol=1e-12)
    scores = standardised(torch.from_numpy(variance)).numpy()
    np.testing.assert_allclose((scores.sum(), (scores**2).sum()), (0.0, 6.0), atol=1e-12)


def test_flap_is_fluctuation_standardised_by_block_and_sorted_globally() -> None:
    model, view, budget = model_and_view()
    choice = flap(view, BATCHES, budget)
    scored = []
    for block in view.blocks:
        x, w = inputs_of(model, block), weight_of(block)
        columns = ((x - x.mean(0)) ** 2).sum(0) / (len(x) - 1) * (w**2).sum(0)
        columns = (columns - columns.mean()) / np.sqrt(((columns - columns.mean()) ** 2).sum() / (len(columns) - 1))
        scored += [(columns[columns_of(block, g)].mean(), block, g) for g in range(block.groups)]
    expected = {block.key: np.ones(block.groups, bool) for block in view.blocks}
    for _, block, group in sorted(scored, key=lambda each: each[0]):
        if block.cost <= budget:
            expected[block.key][group] = False
            budget -= block.cost
    assert all(np.array_equal(choice.masks[block].numpy(), expected[block.key]) for block in view.blocks)
    assert {block.kind.name for block in view.blocks if not choice.masks[block].all()} == {"attention", "mlp"}


def test_flaps_bias_is_what_the_removed_columns_wrote_on_average() -> None:
    model, view, budget = model_and_view()
    choice = flap(view, BATCHES, budget)
    assert set(choice.biases) == {block.key for block in view.blocks if not choice.masks[block].all()}
    for block in view.blocks:
        removed = [c for g in (~choice.masks[block]).nonzero().flatten().tolist() for c in columns_of(block, g)]
        if removed:
            expected = weight_of(block)[:, removed] @ inputs_of(model, block)[:, removed].mean(0)
            np.testing.assert_allclose(choice.biases[block.key].numpy(), expected, rtol=1e-12, atol=1e-14)
    # The first pruned block has the same inputs as in the dense model, so the mean of its output does not change.
    first = next(block for block in view.blocks if block.key in choice.biases)
    expected = inputs_of(model, first).mean(0) @ weight_of(first).T
    written: list[torch.Tensor] = []
    with applied(view, choice):
        hook = first.output.linear.register_forward_hook(lambda _module, _args, output: written.append(output))
        model(IDS)
        hook.remove()
    np.testing.assert_allclose(written[0].flatten(0, 1).detach().mean(0).numpy(), expected, rtol=1e-11, atol=1e-13)


def test_wanda_sp_is_weight_times_input_norm_summed_by_group_and_local_to_each_block() -> None:
    model, view, budget = model_and_view()
    choice, lost = wanda_sp(view, BATCHES, budget), uniform_counts(view, budget)
    assert min(lost.values()) >= 1
    for position, block in enumerate(view.blocks):
        x, w = inputs_after(model, view, choice, position), weight_of(block)
        elements = np.abs(w) * np.sqrt((x**2).sum(0))
        scores = [elements[:, columns_of(block, g)].sum() for g in range(block.groups)]
        removed = np.argsort(scores)[: lost[block.kind.name]]
        assert set((~choice.masks[block]).nonzero().flatten().tolist()) == set(removed.tolist())


def test_llm_pruner_sums_w_times_the_batch_gradient_over_each_groups_weights() -> None:
    model, view, budget = model_and_view(layers=4)
    choice = llm_pruner(view, BATCHES, budget)
    model(input_ids=IDS, labels=IDS).loss.backward()
    elements = {
        name: np.abs(p.detach().numpy() * p.grad.numpy()) for name, p in model.named_parameters() if p.grad is not None
    }
    lost = uniform_counts(view, budget, layers=range(1, 3))
    assert min(lost.values()) >= 1
    for layer in range(4):
        attention, mlp = (
            {n.split(".")[-2]: e for n, e in elements.items() if f"layers.{layer}.{part}." in n}
            for part in ("self_attn", "mlp")
        )
        q, kv = RATIO * HEAD_DIM, HEAD_DIM
        heads = [
            attention["q_proj"][g * q : (g + 1) * q].sum()
            + attention["k_proj"][g * kv : (g + 1) * kv].sum()
            + attention["v_proj"][g * kv : (g + 1) * kv].sum()
            + attention["o_proj"][:, g * q : (g + 1) * q].sum()
            for g in range(KV_HEADS)
        ]
        channels = mlp["gate_proj"].sum(1) + mlp["up_proj"].sum(1) + mlp["down_proj"].sum(0)
        for kind, scores in (("attention", heads), ("mlp", channels)):
            removed = np.argsort(scores)[: lost[kind]].tolist() if 1 <= layer < 3 else []
            assert set((~choice.masks[BlockKey(layer, kind)]).nonzero().flatten().tolist()) == set(removed)


@pytest.mark.parametrize(
    ("layers", "pruned"), [(32, range(4, 30)), (30, range(4, 28)), (5, range(1, 4)), (2, range(2)), (1, range(1))]
)
def test_llm_pruner_keeps_the_papers_share_of_first_and_last_layers(layers: int, pruned: range) -> None:
    assert middle_layers(layers) == pruned


def least_squares(w: Array, hessian: Array, kept: list[int]) -> tuple[Array, float]:
    """Return the best weights with only the columns `kept`, and their error tr((W - W') H (W - W')^T)."""
    solved = np.zeros_like(w)
    solved[:, kept] = np.linalg.solve(hessian[np.ix_(kept, kept)], (w @ hessian[:, kept]).T).T
    return solved, float(np.trace((w - solved) @ hessian @ (w - solved).T))


@pytest.mark.parametrize("columns", [1, 3])
def test_the_surgeon_removes_greedily_and_solves_what_stays(columns: int) -> None:
    rng = np.random.default_rng(columns)
    groups, count = 6, 4
    width = groups * columns
    w, x = rng.normal(size=(5, width)), rng.normal(size=(40, width)) @ rng.normal(size=(width, width))
    hessian = damped(torch.from_numpy(x)).numpy()
    plain = x.T @ x / 40
    np.testing.assert_allclose(hessian, plain + 0.01 * np.trace(plain) / width * np.eye(width), rtol=1e-12, atol=1e-12)
    remaining = list(range(groups))
    for _ in range(count):
        rest = {g: [c for k in remaining if k != g for c in range(k * columns, (k + 1) * columns)] for g in remaining}
        remaining.remove(min(remaining, key=lambda g: least_squares(w, hessian, rest[g])[1]))
    solved, kept = surgeon(torch.from_numpy(w), torch.from_numpy(hessian), columns, count)
    assert kept.nonzero().flatten().tolist() == remaining
    at = [c for k in remaining for c in range(k * columns, (k + 1) * columns)]
    np.testing.assert_allclose(solved.numpy(), least_squares(w, hessian, at)[0], rtol=1e-8, atol=1e-10)


def test_the_surgeon_removes_one_of_two_columns_with_equal_inputs() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4))
    x[:, 2] = x[:, 1]
    kept = surgeon(torch.from_numpy(rng.normal(size=(3, 4))), damped(torch.from_numpy(x)), 1, 2)[1]
    assert not kept[1] or not kept[2]
    assert kept[1] or kept[2]


def test_layerwise_obs_solves_each_block_on_the_pruned_models_inputs() -> None:
    model, view, budget = model_and_view()
    choice, lost = layerwise_obs(view, BATCHES, budget), uniform_counts(view, budget)
    for position, block in enumerate(view.blocks):
        x, w = inputs_after(model, view, choice, position), weight_of(block)
        hessian = x.T @ x / len(x)
        hessian += 0.01 * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
        kept = choice.masks[block].nonzero().flatten().tolist()
        assert len(kept) == block.groups - lost[block.kind.name]
        at = list(itertools.chain.from_iterable(columns_of(block, g) for g in kept))
        np.testing.assert_allclose(
            choice.weights[block.key].numpy(), least_squares(w, hessian, at)[0], rtol=1e-7, atol=1e-10
        )
