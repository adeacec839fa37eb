"""Distillation against its formula by autograd over all logits, and what it must never do."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from gradprune import prune
from gradprune.config import DISTILL_TEXT, PruneConfig, distill_step
from gradprune.data.samples import Samples
from gradprune.errors import ConfigError
from gradprune.models import describe
from gradprune.models.masks import GroupMasks
from gradprune.models.passes import mean_loss
from gradprune.ranks import Ranks
from gradprune.report.folder import summarize
from gradprune.run import Run
from gradprune.surgery.cut import cut, sharing_copy
from gradprune.surgery.distillation import Distillation, descend, distil, taught_samples
from gradprune.surgery.least_squares import Repaired, least_squares
from helpers.mixtures import tiny_mixture
from helpers.pipeline_runs import run
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_ids, tiny_model

# Training on random tokens does not help with other random tokens, so the held-out samples are some of the same ones.
SAMPLES = tiny_ids(samples=8)
HELD_OUT = SAMPLES[:4]
STEP = distill_step(SAMPLES.shape[1])


@pytest.fixture
def held_out_losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses that held-out samples are given, in order: before distillation, then with ever less of the change."""
    losses = [1.0, 0.5]
    monkeypatch.setattr("gradprune.surgery.distillation.mean_loss", lambda *_: losses.pop(0))
    return losses


def pruned(model: PreTrainedModel, samples: Tensor = SAMPLES) -> tuple[PreTrainedModel, Tensor]:
    """The cut model, without a third of the groups except in the first layer, and the dense model's streams.

    The streams are those of the samples, followed by those of four held-out samples.
    """
    view = describe(model)
    own = sharing_copy(model)
    kept = {block.key: torch.arange(block.groups) % 3 != 1 for block in view.blocks}
    masks = GroupMasks({key: mask | (key.layer == 0) for key, mask in kept.items()}, len(view.layers))
    dense = least_squares(describe(own), masks, [samples], [samples[:4]]).dense
    return cut(own, masks, inplace=True), torch.cat(dense)


def divergence(dense: PreTrainedModel, model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean over tokens of KL(dense || model), from all logits at once."""
    with torch.no_grad():
        expected = F.log_softmax(dense(ids).logits.flatten(0, 1), -1)
    found = F.log_softmax(model(ids).logits.flatten(0, 1), -1)
    return F.kl_div(found, expected, reduction="batchmean", log_target=True)


def descended(dense: PreTrainedModel, model: PreTrainedModel, ids: Tensor, text: float) -> tuple[Tensor, Tensor]:
    """The loss that a step reduces, and the divergence in it, from all logits at once except each sample's last."""
    with torch.no_grad():
        expected = F.log_softmax(dense(ids).logits[:, :-1].flatten(0, 1), -1)
    found = F.log_softmax(model(ids).logits[:, :-1].flatten(0, 1), -1)
    apart = F.kl_div(found, expected, reduction="batchmean", log_target=True)
    return (1.0 - text) * apart + text * F.nll_loss(found, ids[:, 1:].flatten()), apart.detach()


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("text", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_steps_follow_the_formula_by_autograd(
    architecture: str, text: float, device: str, held_out_losses: list[float]
) -> None:
    dense = tiny_model(architecture).to(device)
    model, streams = pruned(dense)
    twin, rate = copy.deepcopy(model), 0.02
    entries = [entry.linear for block in describe(twin).linear_blocks for entry in block.projections]
    steps = SAMPLES.to(device).split(STEP)
    for step, ids in enumerate(steps):
        twin.zero_grad()
        loss, apart = descended(dense, twin, ids, text)
        loss.backward()
        for linear in entries:
            w, g = (each.detach().cpu().numpy() for each in (linear.weight, linear.weight.grad))
            r, c = (g**2).mean(1), (g**2).mean(0)
            size = rate * (1 - step / len(steps)) * np.sqrt(apart.item() / w.shape[1] * (w**2).mean())
            linear.weight.data = torch.from_numpy(w - size * g / np.sqrt(np.outer(r, c) / r.mean())).to(device)
    found = distil(describe(model), SAMPLES, SAMPLES, streams[: len(SAMPLES)], text=text, rate=rate, factors=(1.0,))
    assert found == Distillation(len(SAMPLES), text, 1.0, 1.0, 0.5)
    moved = [entry.linear for block in describe(model).linear_blocks for entry in block.projections]
    for linear, expected in zip(moved, entries, strict=True):
        np.testing.assert_allclose(
            linear.weight.detach().cpu().numpy(), expected.weight.detach().cpu().numpy(), rtol=1e-6, atol=3e-9
        )
    others = {name for name, _ in model.named_parameters() if "proj" not in name}
    before, after = weights_of(twin), weights_of(model)
    assert others
    assert all(torch.equal(before[name], after[name]) for name in others)


@pytest.mark.parametrize("recompute", [False, True])
def test_steps_bring_the_predictions_nearer_and_leave_the_dense_model(recompute: bool, device: str) -> None:
    dense = tiny_model(dtype=torch.float32).to(device)
    before = weights_of(dense)
    model, streams = pruned(dense)
    steps = []
    found = distil(
        describe(model),
        SAMPLES,
        HELD_OUT,
        streams[:8],
        text=0.0,
        rate=0.02,
        recompute=recompute,
        advance=lambda: steps.append(1),
    )
    assert found.before == pytest.approx(mean_loss(pruned(dense)[0], [HELD_OUT.to(device)]), rel=1e-6)
    assert found.after == pytest.approx(mean_loss(model, [HELD_OUT.to(device)]), rel=1e-6)
    assert len(steps) == math.ceil(len(SAMPLES) / STEP)
    assert divergence(dense, model, SAMPLES.to(device)).item() < 0.98 * divergence(
        dense, pruned(dense)[0], SAMPLES.to(device)
    )
    assert all(torch.equal(value, before[name]) for name, value in weights_of(dense).items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_repeated_and_recomputed_runs_give_the_same_bits() -> None:
    found = []
    for recompute in (False, False, True):
        model, streams = pruned(tiny_model(dtype=torch.float32))
        distil(describe(model), SAMPLES, HELD_OUT, streams[:8], rate=0.02, recompute=recompute)
        found.append(weights_of(model))
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_the_share_of_the_change_that_is_best_on_held_out_samples_is_kept(held_out_losses: list[float]) -> None:
    changes = {}
    for name, found, factor in (
        ("none", [1.0, 2.0, 1.5, 1.6], 0.0),
        ("not a number", [1.0, *[float("nan")] * 2], 0.0),
        ("a quarter", [1.0, 0.9, 0.8, 0.7], 0.25),
        ("a half", [1.0, 0.9, 0.8, 0.85], 0.5),
        ("all", [1.0, 0.9, 0.95], 1.0),
    ):
        held_out_losses[:] = found
        model, streams = pruned(tiny_model(dtype=torch.float32))
        before = weights_of(model)["model.layers.1.mlp.up_proj.weight"]
        result = distil(describe(model), SAMPLES, HELD_OUT, streams[:8], rate=0.05)
        assert result == Distillation(8, DISTILL_TEXT, factor, 1.0, min([value for value in found if value == value]))
        assert not held_out_losses
        changes[name] = weights_of(model)["model.layers.1.mlp.up_proj.weight"] - before
    assert not changes["none"].any()
    assert not changes["not a number"].any()
    for name, factor in (("a half", 0.5), ("a quarter", 0.25)):
        torch.testing.assert_close(changes[name], factor * changes["all"], rtol=1e-4, atol=1e-7)


def test_attention_is_distilled_and_experts_are_not(held_out_losses: list[float]) -> None:
    dense = tiny_mixture("mixtral")
    model, streams = pruned(dense)
    before = weights_of(model)
    distil(describe(model), SAMPLES, HELD_OUT, streams[:8], factors=(1.0,))
    moved = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert moved
    assert all("self_attn" in name for name in moved)


def test_small_changes_of_bfloat16_weights_add_up() -> None:
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    gradient = torch.ones(64, 64)
    generator = torch.Generator().manual_seed(0)
    # A hundred steps, each a tenth of the distance to the next smaller number.
    for _ in range(100):
        descend(weight, gradient.clone(), 2.0**-8 / 10, generator)
    assert weight.float().mean().item() == pytest.approx((1 - 2.0**-8 / 10) ** 100, rel=2e-3)
    nearest = torch.ones((), dtype=torch.bfloat16)
    assert nearest - torch.tensor(2.0**-8 / 10).bfloat16() == nearest


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_weights_with_a_zero_gradient_do_not_change(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight.clone()
    gradient = torch.zeros(6, 5, dtype=torch.promote_types(dtype, torch.float32))
    descend(weight, gradient.clone(), 0.1, torch.Generator())
    assert torch.equal(weight, before)
    gradient[2, 3] = 1e-9
    descend(weight, gradient, 0.1, torch.Generator())
    changed = (weight != before).nonzero().tolist()
    assert changed == [[2, 3]]


@pytest.mark.parametrize(
    ("options", "parameters", "samples"),
    [
        ({}, 135_000_000, 128),
        ({"seq_len": 2048}, 135_000_000, 8),
        ({"seq_len": 32_768, "num_samples": 2}, 135_000_000, 1),
        ({"num_samples": 5}, 2_000_000_000, 5),
        ({}, 2_000_000_001, 0),
        ({"repair": "none"}, 135_000_000, 0),
        ({"distill_samples": 0}, 135_000_000, 0),
        ({"distill_samples": 32}, 8_000_000_000, 32),
    ],
)
def test_the_default_number_of_samples_depends_on_length_and_model_size(
    options: dict[str, Any], parameters: int, samples: int
) -> None:
    assert PruneConfig(**options).samples_distilled(parameters) == samples


@pytest.mark.parametrize(("seq_len", "samples"), [(8, 4), (128, 4), (129, 3), (512, 1), (2048, 1)])
def test_a_step_has_four_samples_or_fewer_if_these_exceed_512_tokens(seq_len: int, samples: int) -> None:
    assert distill_step(seq_len) == samples


def test_a_run_distils_unless_it_is_asked_not_to() -> None:
    model = tiny_model(dtype=torch.float32)
    found = run(model, held_out_samples=4, distill_samples=7, distill_text=0.5)
    taught = summarize(found)["distillation"]
    assert (taught["samples"], taught["text"]) == (7, 0.5)
    assert taught["after"] <= taught["before"]
    assert "distillation" in found.seconds
    by_default = run(model, held_out_samples=4).distillation
    assert by_default is not None
    assert by_default.samples == found.config.num_samples
    without = run(model, held_out_samples=4, distill_samples=0)
    assert without.distillation is None
    assert summarize(without)["distillation"] is None
    assert "distillation" not in without.seconds


def test_options_of_a_distillation_that_is_off_are_refused() -> None:
    with pytest.raises(ConfigError, match="distill_samples: 8 is given, but only a repaired model is distilled"):
        PruneConfig(repair="none", distill_samples=8)
    for options, left_out in (({"repair": "none"}, "--repair none"), ({"distill_samples": 0}, "--distill_samples 0")):
        with pytest.raises(
            ConfigError, match=f"distill_text: 0.5 changes nothing without distillation; leave out {left_out}"
        ):
            PruneConfig(distill_text=0.5, **options)


def test_kinds_that_are_not_pruned_are_not_distilled(held_out_losses: list[float]) -> None:
    held_out_losses += [0.9] * 4
    model = tiny_model(dtype=torch.float32)
    before = weights_of(model)
    found = run(model, held_out_samples=4, prune_kinds="mlp", distill_samples=8)
    after = weights_of(found.model)
    assert found.distillation is not None
    assert found.distillation.factor == 1.0
    attention = [name for name in before if "self_attn" in name]
    assert attention
    assert all(torch.equal(after[name], before[name]) for name in attention)


def test_without_held_out_samples_nothing_is_distilled_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(dtype=torch.float32)
    # All windows of the text are used as calibration samples.
    config = PruneConfig(num_samples=8, seq_len=16, pruning_ratio=0.2)
    tokens = tiny_ids(samples=1, tokens=8 * 16).flatten()
    found = prune(model, None, config, calibration=tokens, evaluation=tokens)
    assert found.distillation is None
    assert "the text leaves no held-out samples to judge distillation on" in caplog.text


def test_gradients_of_float16_models_stay_within_its_range(device: str) -> None:
    """The model is far from its teacher, and its steps have full size."""
    dense = tiny_model(layers=2, dtype=torch.float16).to(device)
    with torch.no_grad():
        dense.lm_head.weight *= 40.0
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(61, (8, 60), generator=generator)
    model, streams = pruned(dense, samples)
    # Training on random tokens does not help with others, so the model is judged on the same ones.
    found = distil(describe(model), samples, samples, streams[:8], text=0.5)
    assert found.factor > 0.0
    assert all(parameter.isfinite().all() for parameter in model.parameters())


class _OneOfTwo(Ranks):
    """One of two ranks, which shows the other in `shown` what it gives; until then it takes its own for the other's."""

    world = 2

    def __init__(self, rank: int, shown: dict[int, dict[str, Tensor]]) -> None:
        self.rank, self._shown = rank, shown

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        self._shown[self.rank] = dict(tensors)
        return [self._shown.get(rank, dict(tensors)) for rank in range(2)]


def test_ranks_learn_from_the_dense_streams_of_the_same_samples() -> None:
    """Seven of ten samples, in batches of two: the last batch and the held-out samples teach nothing."""
    calibration, streams = torch.arange(10)[:, None], 10.0 + torch.arange(10)[:, None]
    held_out = torch.arange(4)[:, None]
    config = PruneConfig(num_samples=10, batch_size=2, distill_samples=7)
    shown: dict[int, dict[str, Tensor]] = {}
    for rank in (0, 1, 0):
        ranks = _OneOfTwo(rank, shown)
        samples = Samples(calibration, held_out, held_out[:0], held_out.flatten())
        dense = [*ranks.share(streams.split(2)), *ranks.share((-1.0 - held_out).split(2))]
        found = taught_samples(Run(describe(tiny_model()), config, samples, ranks=ranks), Repaired([], dense))
        assert found is not None
    assert torch.equal(found.samples, calibration[:7])
    assert torch.equal(found.dense, streams[:7])
