import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gradprune.calibration.engine import ImportanceEngine
from gradprune.calibration.priors import Priors, removal_priors, removal_steps, similarity_priors, taylor_priors
from gradprune.config import Scoring
from gradprune.models import BlockKey, describe
from gradprune.models.kinds import KIND_NAMES
from gradprune.scoring.hgsp import modulate
from gradprune.scoring.normalization import normalized_scores
from helpers.architectures import tiny
from helpers.tables import make_table
from helpers.tiny_models import ARCHITECTURE_NAMES, tiny_ids, tiny_model


def scored_table():
    """A table whose scores are importances per parameter, as `modulate` requires."""
    table = make_table()
    return replace(table, score=normalized_scores(table, Scoring()))


PRIORS = Priors(
    block={
        BlockKey(layer, kind): 0.1 * (layer + 1) + (0.05 if kind == "mlp" else 0.0)
        for layer in range(4)
        for kind in KIND_NAMES
    },
    layer={0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0},
)


def prior_of(tau: float | None, layer: int, kind: str) -> float:
    """The prior by definition: the layer's if that is below tau, else the block's."""
    gate = np.percentile([1.0, 2.0, 3.0, 4.0], 25) if tau is None else tau
    return PRIORS.layer[layer] if PRIORS.layer[layer] < gate else PRIORS.block[layer, kind]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("tau", [0.0, 2.0, 2.5, math.inf, None])
def test_scores_follow_the_formula(temperature: float, tau: float | None) -> None:
    table = modulate(scored_table(), temperature, tau, PRIORS)
    for row in range(len(table)):
        prior = prior_of(tau, int(table.layer[row]), KIND_NAMES[table.kind[row]])
        expected = table.importance[row] / table.cost[row] * math.log(1.0 + prior) ** temperature
        assert table.prior[row] == prior
        assert table.score[row] == pytest.approx(expected, rel=1e-14)


def test_temperature_0_needs_no_priors() -> None:
    table = modulate(scored_table(), 0.0, None, None)
    np.testing.assert_array_equal(table.score, table.importance / table.cost)
    assert np.isnan(table.prior).all()


def test_a_negative_prior_counts_as_zero() -> None:
    negative = Priors(block=dict.fromkeys(PRIORS.block, -1.0), layer=dict.fromkeys(range(4), -1.0))
    assert (modulate(scored_table(), 1.0, 0.0, negative).score == 0.0).all()


def mean_loss(model, ids) -> float:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_the_removal_prior_is_the_added_loss_without_the_block(architecture: str) -> None:
    model, ids, steps = tiny_model(architecture), tiny_ids(), []
    view = describe(model)
    priors = removal_priors(view, [ids[:1], ids[1:]], lambda: steps.append(1))
    dense = mean_loss(model, ids)
    for layer in range(3):
        for names in (("o_proj",), ("down_proj",), ("o_proj", "down_proj")):
            without = copy.deepcopy(model)
            for name, parameter in without.named_parameters():
                if name.startswith(f"model.layers.{layer}.") and name.removesuffix(".weight").endswith(names):
                    parameter.data.zero_()
            expected = mean_loss(without, ids) - dense
            kind = {"o_proj": "attention", "down_proj": "mlp"}[names[0]]
            found = priors.layer[layer] if len(names) == 2 else priors.block[layer, kind]
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert len(steps) == removal_steps(view) == 9


@pytest.mark.parametrize("architecture", [*ARCHITECTURE_NAMES, "granite", "glm4"])
def test_the_similarity_prior_is_one_minus_the_cosine_of_the_residual_stream(architecture: str) -> None:
    """Granite adds half of what a block writes; in GLM-4 a norm stands between the block and the residual stream."""
    model, ids = tiny(architecture) if architecture not in ARCHITECTURE_NAMES else tiny_model(architecture), tiny_ids()
    priors = similarity_priors(describe(model), [ids[:3], ids[3:]], lambda: None)
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda _m, args: seen.__setitem__("before", args[0]))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: seen.__setitem__("middle", args[0]))
    layer.register_forward_hook(lambda _m, _a, out: seen.__setitem__("after", out))
    with torch.no_grad():
        model(input_ids=ids)
    for found, before, after in (
        (priors.block[1, "attention"], "before", "middle"),
        (priors.block[1, "mlp"], "middle", "after"),
        (priors.layer[1], "before", "after"),
    ):
        expected = 1.0 - F.cosine_similarity(seen[before], seen[after], dim=-1).mean().item()
        assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURE_NAMES, "gemma2", "gemma3_text", "glm4"])
def test_the_taylor_prior_is_the_gradient_of_a_gate_on_what_a_block_adds(architecture: str, reduction: str) -> None:
    """In some architectures a norm stands between, so the gate has to be after it: the norm would cancel its factor."""
    model, ids = tiny(architecture) if architecture not in ARCHITECTURE_NAMES else tiny_model(architecture), tiny_ids()
    with ImportanceEngine(model, "taylor", reduction, "reference") as engine:
        for batch in ids.split(2):
            engine.step(batch)
    priors = taylor_priors(engine.gate_gradients())
    gates = {}
    for block in describe(model).blocks:
        gate = gates[block.kind.name, block.layer] = torch.ones((), dtype=torch.float64, requires_grad=True)
        block.writer.register_forward_hook(
            lambda _m, _a, out, gate=gate: (out[0] * gate, *out[1:]) if isinstance(out, tuple) else out * gate
        )
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for (kind, layer), gate in gates.items():
        assert priors.block[layer, kind] == pytest.approx(abs(gate.grad.item()), rel=1e-9)
    for layer in range(len(model.model.layers)):
        both = gates["attention", layer].grad + gates["mlp", layer].grad
        assert priors.layer[layer] == pytest.approx(abs(both.item()), rel=1e-9)
