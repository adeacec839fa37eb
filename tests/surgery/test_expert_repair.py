"""The re-solved weights of experts, each on its own tokens, against solutions by numpy."""

import copy

import numpy as np
import pytest
import torch

from gradprune.models import describe
from gradprune.models.kinds import BlockKey
from gradprune.models.masks import GroupMasks
from gradprune.ranks import ALONE, Ranks
from gradprune.surgery.least_squares import least_squares
from helpers.mixtures import CHANNELS, EXPERTS, MIXTURES, down_columns, experts_of, tiny_mixture
from helpers.routing import routed, without_experts
from helpers.tiny_models import tiny_ids

RIDGE = 0.1
KEPT = 8


def masks_of(view, layer: int, kept: torch.Tensor) -> GroupMasks:
    """Masks that keep `kept` of a layer's last block, and all groups of every other block."""
    masks = {block.key: torch.ones(block.groups, dtype=torch.bool) for block in view.blocks}
    masks[[key for key in masks if key.layer == layer][-1]] = kept
    return GroupMasks(masks, len(view.layers))


def channels_drawn(keep: int = KEPT) -> torch.Tensor:
    drawn = torch.rand(EXPERTS, CHANNELS, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1)
    return (drawn < keep).flatten()


def experts_at_work(model, ids: torch.Tensor, layer: int) -> tuple[list, torch.Tensor, torch.Tensor]:
    """For each expert of a layer its tokens, factors and channels z; what all write; and the residual stream before.

    The stream is the one that enters the norm before the experts.
    """
    module, seen, streams = experts_of(model)[layer], [], []
    handles = [
        module.register_forward_hook(lambda _module, args, output: seen.append((*args, output))),
        model.model.layers[layer].post_attention_layernorm.register_forward_pre_hook(
            lambda _module, args: streams.append(args[0])
        ),
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    hidden, chosen, factors, wrote = seen[0]
    experts = []
    for expert in range(len(module.down_proj)):
        tokens, place = (chosen == expert).nonzero(as_tuple=True)
        rows = module.gate_up_proj[expert].T if module.is_transposed else module.gate_up_proj[expert]
        bias = getattr(module, "gate_up_proj_bias", None)
        z = module._apply_gate(hidden[tokens] @ rows.T + (0.0 if bias is None else bias[expert]))
        experts.append((tokens, factors[tokens, place].double()[:, None], z.detach()))
    return experts, wrote.flatten(0, -2), streams[0].flatten(0, -2)


def solution(weight: torch.Tensor, columns, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """argmin ||t - W' x_K||^2 + ridge ||W' - W_K||^2 as one stacked system, by numpy's SVD."""
    w, x, target = (each.detach().numpy() for each in (weight[:, columns], x[:, columns], target))
    ridge = RIDGE * np.mean((x**2).sum(0))
    left = np.concatenate([x, np.sqrt(ridge) * np.eye(x.shape[1])])
    right = np.concatenate([target, np.sqrt(ridge) * w.T])
    return torch.from_numpy(np.linalg.lstsq(left, right, rcond=None)[0].T)


def assert_solved(
    model, dense, layer: int, kept: torch.Tensor, experts: list, lacking: torch.Tensor | None, atol: float = 1e-10
) -> None:
    """Each expert's output weights are the solution for its channels `kept` [E, C], and 0 elsewhere."""
    squares = torch.zeros(lacking.shape[0], 1).double() if lacking is not None else None
    for tokens, factors, _ in experts if squares is not None else ():
        squares.index_add_(0, tokens, factors.square())
    before, after = (down_columns(experts_of(each)[layer]) for each in (dense, model))
    for expert, (tokens, factors, z) in enumerate(experts):
        columns, weight = kept[expert], before[expert].T
        x = factors * z
        target = x @ weight.T
        if lacking is not None:
            target = target + factors.square() / squares[tokens] * lacking[tokens]
        found = after[expert].T
        if columns.any():
            expected = solution(weight, columns, x, target)
            assert not torch.allclose(expected, weight[:, columns], rtol=1e-3)
            torch.testing.assert_close(found[:, columns], expected, rtol=1e-7, atol=atol)
        assert not found[:, ~columns].any()


def errors(model, dense, layer: int, kept: torch.Tensor, experts: list) -> list[float]:
    """||W x - W' x||^2 / ||W x||^2 of all experts together, for W' = W without the removed columns and W' re-solved."""
    before, after = (down_columns(experts_of(each)[layer]) for each in (dense, model))
    squares = torch.zeros(3, dtype=torch.float64)
    for whole, cut, now, (_, factors, z) in zip(before, before * kept[..., None], after, experts, strict=True):
        written = factors * z @ whole
        lost = [written, written - factors * z @ cut, written - factors * z @ now]
        squares += torch.stack([each.detach().square().sum() for each in lost])
    return (squares[1:] / squares[0]).tolist()


@pytest.mark.parametrize("architecture", MIXTURES)
def test_each_expert_solves_its_least_squares_problem(architecture: str) -> None:
    model, ids = tiny_mixture(architecture), tiny_ids(12, 12)
    dense, view, kept = copy.deepcopy(model), describe(model), channels_drawn()
    repairs = least_squares(view, masks_of(view, 1, kept), [ids[:5], ids[5:]], [], blend=0.0, ridges=(RIDGE,)).blocks
    assert [(repair.kind, repair.layer) for repair in repairs] == [("expert_channels", 1)]
    assert repairs[0].error < 0.9 * repairs[0].error_before
    experts, _, _ = experts_at_work(dense, ids, 1)
    assert_solved(model, dense, 1, kept.view(EXPERTS, -1), experts, None)
    found = [repairs[0].error_before, repairs[0].error]
    assert found == pytest.approx(errors(model, dense, 1, kept.view(EXPERTS, -1), experts), rel=1e-6)


def test_solutions_that_are_worse_on_held_out_samples_are_rejected() -> None:
    """A fit to nine tokens with next to no ridge does not carry over to others."""
    model = tiny_mixture()
    view, kept, before = describe(model), channels_drawn(), down_columns(experts_of(model)[1]).clone()
    (repair,) = least_squares(
        view, masks_of(view, 1, kept), [tiny_ids(1, 9)], [tiny_ids(24, 12, seed=5)], blend=0.0, ridges=(1e-9,),
        tokens_per_channel=0.0,
    ).blocks  # fmt: skip
    assert repair.error == repair.error_before
    assert torch.equal(down_columns(experts_of(model)[1]), before * kept.view(EXPERTS, -1, 1))


def test_experts_that_write_nothing_have_no_error() -> None:
    model = tiny_mixture()
    with torch.no_grad():
        experts_of(model)[1].down_proj.zero_()
    view = describe(model)
    (repair,) = least_squares(view, masks_of(view, 1, channels_drawn()), [tiny_ids()], [], blend=0.0).blocks
    assert repair.error == repair.error_before == 0.0


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_experts_share_in_restoring_the_residual_stream(architecture: str) -> None:
    """With a blend, the second layer's experts, which keep all channels, make up for what the first layer's lost."""
    model, ids = tiny_mixture(architecture), tiny_ids(12, 12)
    dense, view = copy.deepcopy(model), describe(model)
    repairs = least_squares(view, masks_of(view, 0, channels_drawn()), [ids], [], blend=0.5, ridges=(RIDGE,)).blocks
    assert ("expert_channels", 1) in {(repair.kind, repair.layer) for repair in repairs}
    # The model as it was when the second layer's experts were re-solved: the layers before them are repaired already.
    as_then = copy.deepcopy(model)
    with torch.no_grad():
        experts_of(as_then)[1].down_proj.copy_(experts_of(dense)[1].down_proj)
    _, aimed_at, dense_stream = experts_at_work(dense, ids, 1)
    experts, own, stream = experts_at_work(as_then, ids, 1)
    lacking = 0.5 * (dense_stream - stream + aimed_at - own)
    assert lacking.abs().max() > 1e-3
    assert_solved(model, dense, 1, torch.ones(EXPERTS, CHANNELS, dtype=torch.bool), experts, lacking)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_the_remaining_experts_make_up_for_removed_ones(architecture: str) -> None:
    model, ids = tiny_mixture(architecture), tiny_ids(12, 12)
    dense, view = copy.deepcopy(model), describe(model, ["experts"])
    kept = torch.arange(EXPERTS) != 1
    masks = masks_of(view, 1, kept)
    repairs = least_squares(view, masks, [ids[:5], ids[5:]], [], blend=0.0, ridges=(RIDGE,)).blocks
    assert [(repair.kind, repair.layer) for repair in repairs] == [("experts", 1)]
    _, own, _ = experts_at_work(dense, ids, 1)
    experts, now, _ = experts_at_work(without_experts(dense, masks), ids, 1)
    assert not len(experts[1][0])
    # Routers compute factors in fp32; here they are written out in fp64.
    assert_solved(model, dense, 1, kept[:, None].expand(-1, CHANNELS), experts, own - now, atol=1e-6)


def test_an_expert_that_sees_few_tokens_or_none_is_left_as_it_is() -> None:
    """Of 40 tokens, two are routed to expert 1, too few for the 8 channels that it keeps, and none to expert 3."""
    model, ids, kept = tiny_mixture(), tiny_ids(4, 10), channels_drawn()
    dense = copy.deepcopy(model)
    chosen = torch.tensor([[0, 2]] * 40)
    chosen[[3, 17], 1] = 1
    for tokens_per_channel, solved in ((0.5, {0, 2}), (0.25, {0, 1, 2}), (float("inf"), set())):
        repaired = copy.deepcopy(dense)
        view = describe(repaired)
        with routed(repaired, chosen):
            least_squares(
                view, masks_of(view, 1, kept), [ids], [], blend=0.0, ridges=(RIDGE,),
                tokens_per_channel=tokens_per_channel,
            )  # fmt: skip
        before, after = (down_columns(experts_of(each)[1]) for each in (dense, repaired))
        stays = kept.view(EXPERTS, -1)
        same = [torch.equal(after[expert][stays[expert]], before[expert][stays[expert]]) for expert in range(EXPERTS)]
        assert {expert for expert in range(EXPERTS) if not same[expert]} == solved
        assert not after[~stays].any()


class TwoRanksWithTheSameSamples(Ranks):
    """Two ranks that have the same samples."""

    def sum(self, own: torch.Tensor) -> torch.Tensor:
        return own + own


def test_an_expert_is_re_solved_if_all_ranks_together_have_enough_tokens() -> None:
    """On each of two ranks, two tokens are routed to expert 1, which keeps 8 channels."""
    ids, kept, chosen = tiny_ids(4, 10), channels_drawn(), torch.tensor([[0, 2]] * 40)
    chosen[[3, 17], 1] = 1
    found = []
    for batches, ranks in (([ids], TwoRanksWithTheSameSamples()), ([ids, ids], ALONE), ([ids], ALONE)):
        model = tiny_mixture()
        view = describe(model)
        with routed(model, chosen):
            least_squares(view, masks_of(view, 1, kept), batches, [], blend=0.0, ridges=(RIDGE,), ranks=ranks)
        found.append(down_columns(experts_of(model)[1]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found[0][1], found[2][1], rtol=1e-3)


@pytest.mark.parametrize("kinds", [None, ["attention", "experts"]])
def test_the_repaired_model_is_closer_to_the_dense_one(kinds: list[str] | None) -> None:
    model, ids = tiny_mixture().float(), tiny_ids(24, 12)
    view = describe(model, kinds)
    masks = {}
    for block in view.blocks:
        kept = torch.ones(block.groups, dtype=torch.bool)
        if block.kind.name == "expert_channels":
            kept = channels_drawn()
        elif block.kind.name == "experts":
            kept[block.layer] = False
        masks[block.key] = kept
    masks = GroupMasks(masks, 2)
    logits = {}
    with torch.no_grad():
        dense = model(ids).logits
        for tokens_per_channel in (float("inf"), 0.5):
            repaired = copy.deepcopy(model)
            least_squares(
                describe(repaired, kinds), masks, list(ids.split(8)), [], blend=0.5,
                tokens_per_channel=tokens_per_channel,
            )  # fmt: skip
            reroute = without_experts(repaired, masks)
            logits[tokens_per_channel] = (reroute(ids).logits - dense).square().mean()
    assert logits[0.5] < 0.9 * logits[float("inf")]


def test_experts_before_the_first_pruned_block_do_not_change() -> None:
    model, ids = tiny_mixture(), tiny_ids(6, 12)
    view = describe(model)
    before = experts_of(model)[0].down_proj.clone()
    least_squares(view, masks_of(view, 1, channels_drawn()), [ids], [])
    assert torch.equal(experts_of(model)[0].down_proj, before)
    assert BlockKey(0, "expert_channels") in {block.key for block in view.blocks}
