"""Least squares against independent fp64 maths, and what it must never do."""

import numpy as np
import pytest
import torch

from gradprune.config import PruneConfig
from gradprune.errors import NonFiniteError
from gradprune.models import BlockKey, describe
from gradprune.models.masks import GroupMasks
from gradprune.surgery.cut import cut, sharing_copy
from gradprune.surgery.least_squares import RIDGES, least_squares
from gradprune.surgery.masking import masked, masks_by_block
from gradprune.surgery.moments import Problem
from gradprune.surgery.repair import repair_warning
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_ids, tiny_model


def random_masks(view, seed: int = 0, keep: float = 0.6) -> GroupMasks:
    generator = torch.Generator().manual_seed(seed)

    def kept(block):
        if block is None:
            return torch.empty(0, dtype=torch.bool)
        chosen = torch.rand(block.groups, generator=generator) < keep
        chosen[0] = True
        return chosen

    return GroupMasks.of_layers(**{kind: map(kept, view.of_kind(kind)) for kind in ("attention", "mlp")})


def only(view, layer: int, kind: str, kept: torch.Tensor) -> GroupMasks:
    """Masks that prune a single block."""
    return GroupMasks({**all_kept(view), BlockKey(layer, kind): kept}, len(view.layers))


def all_kept(view) -> dict[BlockKey, torch.Tensor]:
    return {block.key: torch.ones(block.groups, dtype=torch.bool) for block in view.blocks}


def inputs_of(model, linear, ids) -> torch.Tensor:
    found = []
    handle = linear.register_forward_pre_hook(lambda _m, args: found.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_one_block_equals_an_independent_lstsq(architecture: str, kind: str, device: str) -> None:
    """Numpy's SVD solves argmin ||W x - W' x_K||^2 + ridge ||W' - W_K||^2 as one stacked system."""
    model, ids = tiny_model(architecture, kv_heads=3, channels=10).to(device), tiny_ids(samples=6).to(device)
    view = describe(model)
    block = view.of_kind(kind)[1]
    kept = torch.arange(block.groups) % 3 != 1
    x = inputs_of(model, block.output.linear, ids).cpu().numpy()
    w = block.output.linear.weight.detach().cpu().numpy().copy()
    k = block.output.columns_of(kept.nonzero().flatten()).numpy()
    ridge = 0.1 * np.mean((x[:, k] ** 2).sum(0))
    left = np.concatenate([x[:, k], np.sqrt(ridge) * np.eye(len(k))])
    right = np.concatenate([x @ w.T, np.sqrt(ridge) * w[:, k].T])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    least_squares(view, only(view, 1, kind, kept), [ids], [], blend=0.0, ridges=(0.1,))
    found = block.output.linear.weight.detach().cpu().numpy()
    np.testing.assert_allclose(found[:, k], expected, rtol=1e-9, atol=1e-12)
    assert not np.delete(found, k, axis=1).any()


def test_removed_channels_that_are_combinations_of_kept_ones_cost_nothing() -> None:
    model, ids = tiny_model(channels=10), tiny_ids(samples=6)
    with torch.no_grad():
        for layer in model.model.layers:
            # Channels 7 to 9 are 2, 3 and -1 times channels 0 to 2: up's rows are scaled, gate's rows are the same.
            layer.mlp.gate_proj.weight[7:] = layer.mlp.gate_proj.weight[:3]
            layer.mlp.up_proj.weight[7:] = layer.mlp.up_proj.weight[:3] * torch.tensor([[2.0], [3.0], [-1.0]])
        dense = model(ids).logits
    view = describe(model)
    kept = torch.arange(10) < 7
    masks = GroupMasks({**all_kept(view), **{BlockKey(layer, "mlp"): kept for layer in range(3)}}, 3)
    with masked(view, masks), torch.no_grad():
        assert (model(ids).logits - dense).abs().max() > 1e-3
    least_squares(view, masks, [ids], [], ridges=(1e-12,))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_no_block_is_worse_on_the_calibration_data(seed: int, blend: float, device: str) -> None:
    model, ids = tiny_model(seed=seed, channels=12, dtype=torch.float32).to(device), tiny_ids(samples=6, seed=seed)
    view = describe(model)
    repairs = least_squares(view, random_masks(view, seed), [ids], [], blend=blend).blocks
    assert repairs
    assert all(repair.error <= repair.error_before for repair in repairs)
    assert any(repair.error < 0.99 * repair.error_before for repair in repairs)


def test_blocks_are_solved_in_order_on_the_model_repaired_so_far() -> None:
    """Each block's solution fits the inputs that it gets after the repaired blocks before it, not the dense ones."""
    model, ids = tiny_model(channels=10), tiny_ids(samples=6)
    view, twin = describe(model), tiny_model(channels=10)
    masks = random_masks(view, 3)
    least_squares(view, masks, [ids], [], blend=0.0, ridges=(0.1,))
    twin_view = describe(twin)
    for (block, kept), solved in zip(masks_by_block(twin_view, masks), view.blocks, strict=True):
        linear = block.output.linear
        if not kept.all():
            x = inputs_of(twin, linear, ids)
            k = block.output.columns_of(kept.nonzero().flatten())
            gram = x.T @ x
            unit = gram[k][:, k].diagonal().mean()
            right = linear.weight.detach() @ gram[:, k] + 0.1 * unit * linear.weight.detach()[:, k]
            expected = torch.linalg.solve(gram[k][:, k] + 0.1 * unit * torch.eye(len(k)).double(), right.T).T
            torch.testing.assert_close(solved.output.linear.weight.detach()[:, k], expected, rtol=1e-8, atol=1e-10)
            with torch.no_grad():
                linear.weight.zero_()
                linear.weight[:, k] = expected


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_repaired_logits_are_closer_than_pruned_ones_with_and_without_a_blend(architecture: str, device: str) -> None:
    model = tiny_model(architecture, channels=24, dtype=torch.float32).to(device)
    ids = tiny_ids(samples=24, tokens=12).to(device)
    view, batches = describe(model), list(ids.split(8))
    masks = random_masks(view, 1)
    with torch.no_grad():
        dense = model(ids).logits
        with masked(view, masks):
            pruned = (model(ids).logits - dense).square().mean()
        for blend in (0.0, 0.5):
            repaired = sharing_copy(model)
            least_squares(describe(repaired), masks, batches, [], blend=blend)
            assert (repaired(ids).logits - dense).square().mean() < 0.9 * pruned


@pytest.mark.parametrize(("tokens", "samples"), [(9, 4), (9, 8), (12, 40)])
def test_the_ridge_with_the_least_held_out_error_is_found(tokens: int, samples: int) -> None:
    """It is the best of all ridges, from two to twenty tokens per column, but is found with fewer attempts."""
    model = tiny_model(channels=24, dtype=torch.float64)
    view, attempts = describe(model), 0
    masks = only(view, 0, "mlp", torch.arange(24) % 3 > 0)
    fit, judge = tiny_ids(samples, tokens), [tiny_ids(24, 12, seed=5)]

    def error(ridges) -> tuple[float, float]:
        repair = least_squares(describe(sharing_copy(model)), masks, [fit], judge, ridges=ridges).blocks[0]
        return repair.error, repair.ridge

    assert error(RIDGES) == min(error((ridge,)) for ridge in RIDGES)

    def counted(problem, ridge):
        nonlocal attempts
        attempts += 1
        return solution(problem, ridge)

    solution = Problem.solution
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "solution", counted)
        least_squares(view, masks, [fit], judge, blend=0.0)
    assert attempts < len(RIDGES)


def test_a_solution_that_is_worse_on_held_out_samples_is_rejected() -> None:
    """A fit to nine tokens with next to no ridge does not carry over to others."""
    model = tiny_model(channels=24)
    view, kept = describe(model), torch.arange(24) % 3 > 0
    output = view.of_kind("mlp")[0].output.linear.weight
    before = output.detach().clone()
    (repair,) = least_squares(
        view, only(view, 0, "mlp", kept), [tiny_ids(1, 9)], [tiny_ids(24, 12, seed=5)], blend=0.0, ridges=(1e-9,)
    ).blocks
    assert repair.error == repair.error_before
    assert torch.equal(output, before * kept)


def test_the_cut_model_computes_what_the_repaired_one_does(device: str) -> None:
    model, ids = tiny_model("qwen2", channels=12).to(device), tiny_ids().to(device)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    view = describe(model)
    masks = random_masks(view, 4, keep=0.5)
    copied = sharing_copy(model)
    least_squares(describe(copied), masks, [ids], [])
    repaired = copied(ids).logits.detach()
    pruned = cut(copied, masks, inplace=True)
    torch.testing.assert_close(pruned(ids).logits, repaired, rtol=1e-9, atol=1e-10)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_without_a_blend_blocks_that_keep_everything_or_nothing_are_left_alone() -> None:
    model, ids = tiny_model(), tiny_ids()
    view = describe(model)
    masks = only(view, 1, "mlp", torch.zeros(10, dtype=torch.bool))
    steps = []
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert least_squares(view, masks, [ids], [ids], blend=0.0, advance=lambda: steps.append(1)) == ([], [])
    assert len(steps) == len(view.blocks)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert changed == {"model.layers.1.mlp.down_proj.weight"}
    assert not view.of_kind("mlp")[1].output.linear.weight.any()


def test_bf16_weights_are_rounded_once(device: str) -> None:
    model = tiny_model(channels=16, dtype=torch.float32).to(device)
    ids = tiny_ids(samples=8)
    low = tiny_model(channels=16, dtype=torch.bfloat16).to(device)
    with torch.no_grad():
        for a, b in zip(model.parameters(), low.parameters(), strict=True):
            a.copy_(b)
    for each in (model, low):
        view = describe(each)
        least_squares(view, random_masks(view, 5), [ids], [], blend=0.0, ridges=(0.1,))
    assert low.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    a, b = (each.model.layers[0].mlp.down_proj.weight.float() for each in (model, low))
    torch.testing.assert_close(b, a, rtol=0.1, atol=0.03)


def test_inputs_that_are_zero_leave_the_kept_weights_unchanged() -> None:
    model, ids = tiny_model(channels=10), tiny_ids()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()  # every input of down_proj is 0
    view = describe(model)
    before = view.of_kind("mlp")[0].output.linear.weight.detach().clone()
    kept = torch.arange(10) < 6
    repair = least_squares(view, only(view, 0, "mlp", kept), [ids], [], ridges=(0.0,)).blocks[0]
    assert torch.equal(view.of_kind("mlp")[0].output.linear.weight[:, :6], before[:, :6])
    assert repair.error_before == repair.error == 0.0


def test_a_nan_input_is_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    view = describe(model)
    with pytest.raises(NonFiniteError, match=r"layer 1's down_proj is not finite"):
        least_squares(view, only(view, 1, "mlp", torch.arange(10) < 6), [tiny_ids()], [])


@pytest.mark.parametrize(("samples", "warned"), [(9, True), (10, False)])
def test_too_few_tokens_for_the_widest_projection_cause_a_warning(samples: int, warned: bool) -> None:
    """200 columns need 400 tokens."""
    found = repair_warning(200, PruneConfig(num_samples=samples, seq_len=40))
    assert (found is not None) == warned
    if found is not None:
        assert "200 columns of a projection on 360 tokens" in found
        assert found.endswith("--num_samples 10.")
    assert repair_warning(200, PruneConfig(num_samples=samples, seq_len=40, repair="none")) is None


def test_only_blocks_from_the_first_pruned_one_on_are_repaired() -> None:
    model, ids = tiny_model(channels=10), tiny_ids(samples=6)
    view = describe(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    repairs = least_squares(
        view, only(view, 1, "attention", torch.arange(view.of_kind("attention")[1].groups) > 0), [ids], []
    ).blocks
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    behind = [(1, "self_attn.o"), (1, "mlp.down"), (2, "self_attn.o"), (2, "mlp.down")]
    assert changed == {f"model.layers.{layer}.{name}_proj.weight" for layer, name in behind}
    assert len(repairs) == len(behind)
    assert all(repair.error < repair.error_before for repair in repairs)


def test_a_copy_is_repaired_without_touching_the_model_it_shares_memory_with() -> None:
    model, ids = tiny_model(channels=12), tiny_ids()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    copied = sharing_copy(model)
    least_squares(describe(copied), random_masks(describe(copied), 3), [ids], [])
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    shared = sum(a.data_ptr() == b.data_ptr() for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    assert 0 < shared < len(before)
