"""`obs` of expert channels: the cost of removing a channel once least squares has re-solved the expert's others."""

import pytest
import torch
import torch.nn.functional as F

from gradprune import ImportanceEngine
from gradprune.models import BlockKey, describe
from helpers.mixtures import CHANNELS, EXPERTS, MIXTURES, down_columns, experts_of, tiny_mixture
from helpers.pipeline_runs import run
from helpers.routing import routed
from helpers.tiny_models import tiny_ids, tiny_model


def scores(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Each layer's `obs` importances of the expert channels, [E * C]."""
    with ImportanceEngine(model, "obs", backend="reference") as engine:
        for part in ids.split(2):
            engine.step(part)
    found = engine.scores()
    blocks = [block for block in describe(model).blocks if block.kind.name == "expert_channels"]
    return [found.importance[block].double() for block in blocks]


def channels_and_output_gradients(
    model, ids: torch.Tensor, layer: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """By expert, the channels z [r, C] of its r tokens, and the losses' gradients [r, O] with respect to its output."""
    module, z, dy = experts_of(model)[layer], [[] for _ in range(EXPERTS)], [[] for _ in range(EXPERTS)]
    for sample in ids.split(1):
        seen = []
        handle = module.register_forward_hook(lambda _m, args, output, seen=seen: seen.append((*args, output)))
        logits = model(input_ids=sample, use_cache=False).logits[:, :-1]
        handle.remove()
        hidden, chosen, factors, output = seen[0]
        loss = F.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten())
        (of_output,) = torch.autograd.grad(loss, output)
        of_output = of_output.view(-1, of_output.shape[-1])
        for expert in range(EXPERTS):
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            rows = module.gate_up_proj[expert].T if module.is_transposed else module.gate_up_proj[expert]
            bias = getattr(module, "gate_up_proj_bias", None)
            before = hidden[tokens] @ rows.T + (0.0 if bias is None else bias[expert])
            z[expert].append(module._apply_gate(before).detach())
            dy[expert].append(factors[tokens, place].double()[:, None] * of_output[tokens])
    return [torch.cat(parts) for parts in z], [torch.cat(parts) for parts in dy]


def removal_costs(weight: torch.Tensor, z: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    """Repeatedly remove the channel with the cheapest least-squares optimum; the added costs [C], made to ascend."""
    gram = z.T @ z / len(z)
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram)).double()

    def optimum(gone: list[int]) -> float:
        rest = [channel for channel in range(CHANNELS) if channel not in gone]
        across = gram[rest][:, gone]
        left = gram[gone][:, gone] - across.T @ torch.linalg.solve(gram[rest][:, rest], across)
        return float(0.5 * curvature * ((weight[:, gone] @ left) * weight[:, gone]).sum())

    costs, gone, last, total = torch.zeros(CHANNELS).double(), [], 0.0, 0.0
    while len(gone) < CHANNELS:
        totals = {channel: optimum([*gone, channel]) for channel in range(CHANNELS) if channel not in gone}
        cheapest = min(totals, key=totals.__getitem__)
        last = max(last, totals[cheapest] - total)
        costs[cheapest], total = last, totals[cheapest]
        gone.append(cheapest)
    return costs


@pytest.mark.parametrize("architecture", MIXTURES)
def test_each_experts_costs_come_from_its_own_tokens(architecture: str) -> None:
    model, ids = tiny_mixture(architecture), tiny_ids(6, 12)
    found = scores(model, ids)[1].view(EXPERTS, CHANNELS)
    z, dy = channels_and_output_gradients(model, ids, 1)
    weights = down_columns(experts_of(model)[1]).detach()
    expected = []
    for expert in range(EXPERTS):
        curvature = dy[expert].detach().square().sum() / (len(ids) * dy[expert].shape[1])
        expected.append(removal_costs(weights[expert].T, z[expert], curvature))
    # All experts of a block share its reach.
    ratio = found / torch.stack(expected)
    torch.testing.assert_close(ratio, ratio[0, :1].expand_as(ratio), rtol=1e-4, atol=0.0)


def test_curvatures_are_means_over_the_samples_and_the_output_width() -> None:
    """They are defined as for other blocks, so that costs are comparable between blocks."""
    model, ids = tiny_mixture(), tiny_ids(6, 12)
    with ImportanceEngine(model, "obs", backend="reference") as engine:
        for part in ids.split(2):
            engine.step(part)
    found = engine._accumulators[BlockKey(1, "expert_channels")].curvatures(len(ids))
    _, dy = channels_and_output_gradients(model, ids, 1)
    width = model.config.hidden_size
    assert width != CHANNELS
    expected = torch.stack([of_expert.detach().square().sum() / (len(ids) * width) for of_expert in dy])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0.0)


def test_channels_of_an_expert_without_tokens_cost_next_to_nothing() -> None:
    model, ids = tiny_mixture(), tiny_ids(4, 10)
    with routed(model, torch.tensor([[0, 2]] * 20)):
        found = scores(model, ids)[0].view(EXPERTS, CHANNELS)
    assert found[[0, 2]].min() > 1e-9
    assert found[[1, 3]].max() < 1e-30
    assert (found > 0.0).all()


def test_curvatures_of_experts_come_from_all_samples() -> None:
    """Each expert sees few of a sample's tokens. A dense model's curvatures come from only 32 samples."""
    options = {"importance_method": "obs", "num_samples": 36, "seq_len": 8, "batch_size": 12, "repair": "none"}
    # There is a taylor prior only if gradients of all samples were computed.
    assert "taylor" in run(tiny_mixture(), **options).evidence.priors
    assert "taylor" not in run(tiny_model(), **options).evidence.priors
