"""What a calibration collects if `evidence` is "needed": no more than the method requires."""

from pathlib import Path

import pytest
import torch

from gradprune import ImportanceEngine
from gradprune.calibration.evidence import Evidence
from gradprune.errors import ConfigError, GradPruneError
from gradprune.models import describe
from gradprune.ranks import Ranks
from helpers.engine_runs import run_engine
from helpers.flops import CountFlops
from helpers.pipeline_runs import run
from helpers.tiny_models import METHODS, tiny_ids, tiny_model

HOLDS = {
    "magnitude": ["magnitude"],
    "wanda": ["magnitude", "wanda"],
    "group_fisher": ["group_fisher", "magnitude", "wanda"],
    "obs": ["group_fisher", "magnitude", "obs", "wanda"],
    "taylor": ["fisher", "group_fisher", "magnitude", "taylor", "wanda"],
    "taylor_2nd": ["fisher", "group_fisher", "magnitude", "taylor", "wanda"],
    "fisher": ["fisher", "group_fisher", "magnitude", "taylor", "wanda"],
}


def engine_of(model, ids, method="group_fisher", steps=1, batch_size=2, **options) -> ImportanceEngine:
    """An engine that has run `ids` in batches, and has computed every weight gradient in the first `steps` of them."""
    engine = ImportanceEngine(model, method, backend="reference", weight_gradient_steps=steps, **options)
    with engine:
        for batch in ids.split(batch_size):
            engine.step(batch)
    return engine


def flops(engine: ImportanceEngine, ids) -> int:
    with engine, CountFlops() as counter:
        engine.step(ids)
    return counter.total


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("method", METHODS)
def test_scores_equal_those_of_an_engine_that_collects_everything(method: str, reduction: str) -> None:
    model, ids = tiny_model("qwen2"), tiny_ids(samples=6)
    needed = engine_of(model, ids, method, reduction=reduction).scores()
    everything = run_engine(model, ids, method, reduction)
    for kind in ("attention", "mlp"):
        for one, other in zip(getattr(needed, kind), getattr(everything, kind), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_no_weight_gradient_is_computed_after_the_first_steps(reduction: str) -> None:
    """The only difference is one product of dy and x per projection, with 2 N T O I operations each."""
    model, ids = tiny_model(dtype=torch.float32), tiny_ids(samples=4, tokens=9)
    engine = ImportanceEngine(model, "group_fisher", reduction, "reference", weight_gradient_steps=1)
    first, second = flops(engine, ids), flops(engine, ids)
    weights = sum(entry.linear.weight.numel() for block in describe(model).blocks for entry in block.projections)
    assert first - second == 2 * ids.numel() * weights


@pytest.mark.parametrize(("method", "forward_passes"), [("magnitude", 1), ("wanda", 3), ("group_fisher", 3)])
def test_a_method_runs_the_model_no_more_often_than_it_needs(method: str, forward_passes: int) -> None:
    model, calls, gradients = tiny_model(), [], []
    model.model.layers[0].register_forward_hook(
        lambda _module, _args, output: calls.append(1) or gradients.append(output.requires_grad)
    )
    engine_of(model, tiny_ids(samples=6), method)
    assert len(calls) == forward_passes
    assert gradients == [step == 0 or method == "group_fisher" for step in range(forward_passes)]


def test_only_the_first_batches_are_diagnosed() -> None:
    model, ids = tiny_model(), tiny_ids(samples=6)
    needed = engine_of(model, ids, steps=2).evidence(steps=3)
    assert needed.gradients == run_engine(model, ids[:4]).gradients
    assert len(needed.steps) == 2
    assert (needed.num_samples, needed.diagnosed_samples) == (6, 4)


def test_the_first_batches_are_counted_over_all_ranks() -> None:
    """The second of two ranks has batches 1, 3 and 5, two of which are among the first four."""

    class Second(Ranks):
        rank, world = 1, 2

    state = engine_of(tiny_model(), tiny_ids(samples=6), steps=4, ranks=Second()).state()
    assert state["1.mlp.scales"].shape == (3,)
    assert state["1.mlp.statistics.up_proj"].shape == (2, 5)


def test_a_gradient_fix_needs_the_gradients_of_all_samples() -> None:
    model, ids = tiny_model(), tiny_ids(samples=6)
    fixed = engine_of(model, ids, gradient_fix="adaptive")
    everything = run_engine(model, ids, "group_fisher", gradient_fix="adaptive")
    assert fixed.scores().scaling == everything.scaling
    assert fixed.evidence().diagnosed_samples == 6


def test_the_evidence_knows_which_fixes_a_search_can_still_try() -> None:
    model, ids, wanted = tiny_model(), tiny_ids(samples=4), ("none", "adaptive")
    assert engine_of(model, ids).evidence().fixes(wanted) == ("none",)
    assert engine_of(model, ids, steps=2).evidence().fixes(wanted) == wanted
    batches = {"steps": 2, "reduction": "batch"}
    assert engine_of(model, ids, **batches).evidence().fixes(wanted) == ("none",)
    assert engine_of(model, ids, gradient_fix="normalize", **batches).evidence().fixes(wanted) == ("normalize",)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "group_fisher", "taylor"])
def test_an_engine_resumes_from_a_state_in_which_steps_differ(method: str) -> None:
    model, ids = tiny_model(), tiny_ids(samples=8)
    whole = engine_of(model, ids, method, steps=2)
    half = engine_of(model, ids[:6], method, steps=2)
    resumed = ImportanceEngine(model, method, backend="reference", weight_gradient_steps=2)
    done = ids[:6] if method != "magnitude" else ids[:4]
    resumed.restore(half.state(), list(done.split(2)))
    with resumed:
        resumed.step(ids[6:])
    one, other = whole.evidence(steps=4), resumed.evidence(steps=4)
    assert one.gradients == other.gradients
    assert one.steps == other.steps
    assert one.components.keys() == other.components.keys()
    assert all(torch.equal(one.components[name], other.components[name]) for name in one.components)
    assert whole.gate_gradients() == resumed.gate_gradients()


def test_the_model_is_as_it_was_after_steps_that_differ() -> None:
    model = tiny_model()
    engine_of(model, tiny_ids(), "wanda")
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_an_evidence_file_holds_what_its_method_needs(method: str, tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float32)
    options = {"importance_method": method, "batch_size": 2, "collect_batches": 2, "repair": "none"}
    run(model, output_name="a", output_dir=str(tmp_path), **options)
    evidence = Evidence.load(tmp_path / "a" / "analysis" / "evidence.safetensors", model)
    assert sorted(evidence.components) == HOLDS[method]
    everywhere = method in ("taylor", "taylor_2nd", "fisher")
    assert evidence.diagnosed_samples == (8 if everywhere else 4)
    assert evidence.num_samples == (4 if method == "magnitude" else 8)
    assert ("taylor" in evidence.priors) == (method not in ("magnitude", "wanda"))


@pytest.fixture
def needed_file(tmp_path: Path) -> str:
    given = {"importance_method": "group_fisher", "output_name": "a", "output_dir": str(tmp_path)}
    run(tiny_model(), collect_batches=1, repair="none", **given)
    return str(tmp_path / "a" / "analysis" / "evidence.safetensors")


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"importance_method": "taylor"}, GradPruneError, r"'taylor' was not collected .* or with evidence 'all'"),
        ({"importance_method": "obs"}, GradPruneError, r"'obs' was not collected .* or with evidence 'all'"),
        (
            {"gradient_fix": "adaptive", "importance_method": "group_fisher"},
            ConfigError,
            r"gradient_fix: 'adaptive' needs .* all 8 samples.* 4; calibrate",
        ),
    ],
)
def test_missing_evidence_is_refused_with_the_remedy(options, error, named: str, needed_file: str) -> None:
    with pytest.raises(error, match=named):
        run(tiny_model(), evidence_file=needed_file, repair="none", **options)


def test_a_method_without_evidence_is_refused_before_anything_is_measured(needed_file: str, monkeypatch) -> None:
    monkeypatch.setattr("gradprune.pipeline.perplexity", None)
    with pytest.raises(
        GradPruneError, match=r"'obs'.* name one of those that were, magnitude, wanda, group_fisher, or"
    ):
        run(tiny_model(), evidence_file=needed_file)


def test_a_missing_prior_is_refused_with_the_remedy(tmp_path: Path) -> None:
    options = {"importance_method": "wanda", "repair": "none"}
    run(tiny_model(), output_name="a", output_dir=str(tmp_path), **options)
    file = str(tmp_path / "a" / "analysis" / "evidence.safetensors")
    with pytest.raises(ConfigError, match=r"prior: 'taylor' is not in evidence_file.* evidence 'all'"):
        run(tiny_model(), evidence_file=file, prior="taylor", temperature=1.0, **options)
    asked = run(tiny_model(), prior="taylor", temperature=1.0, collect_batches=1, batch_size=2, **options)
    full = run(tiny_model(), prior="taylor", temperature=1.0, evidence="all", batch_size=2, **options)
    assert (asked.table.prior == full.table.prior).all()


def test_obs_reads_samples_beyond_those_that_give_its_curvatures() -> None:
    """Costs use all samples' second moments; only the ratio between kinds depends on which samples had gradients."""
    model, ids = tiny_model("qwen2"), tiny_ids(samples=6)
    everything = engine_of(model, ids, "obs")
    stepped = engine_of(model, ids[:4], "obs")
    stepped.read([ids[4:]])
    found = stepped.evidence()
    assert sorted(found.components) == ["magnitude", "obs"]
    assert (found.num_samples, found.diagnosed_samples) == (6, 2)
    assert stepped.gate_gradients() == {}
    ratios: dict[str, list[torch.Tensor]] = {}
    for block in everything._accumulators:
        ratio = stepped.scores().importance[block] / everything.scores().importance[block]
        ratios.setdefault(block.kind, []).append(ratio)
    of_kinds = [torch.cat(of_kind) for of_kind in ratios.values()]
    for ratio in of_kinds:
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0.0)
    assert of_kinds[0][0] != of_kinds[1][0]


def test_batches_may_be_read_after_costs_were_computed() -> None:
    model, ids = tiny_model("qwen2"), tiny_ids(samples=6)
    at_once, by_turns = (engine_of(model, ids[:2], "obs") for _ in range(2))
    at_once.read(ids[2:].split(2))
    first = by_turns.scores()
    for batch in ids[2:].split(2):
        by_turns.read([batch])
    found, expected = by_turns.scores(), at_once.scores()
    for kind in ("attention", "mlp"):
        assert all(map(torch.equal, getattr(found, kind), getattr(expected, kind)))
    assert not torch.equal(found.mlp[0], first.mlp[0])


def test_only_obs_reads_samples_without_their_gradients() -> None:
    engine = engine_of(tiny_model(), tiny_ids(), "group_fisher")
    with pytest.raises(GradPruneError, match="read: 'group_fisher' takes every sample by a step"):
        engine.read([tiny_ids()])


@pytest.mark.parametrize(
    ("options", "backward_passes"),
    [
        ({}, 2),
        ({"evidence": "all"}, 3),
        ({"temperature": 1.0, "prior": "taylor"}, 3),
        ({"gradient_fix": "adaptive"}, 3),
    ],
)
def test_obs_runs_only_as_many_backward_passes_as_are_needed(options, backward_passes, monkeypatch) -> None:
    monkeypatch.setattr("gradprune.calibration.gather.CURVATURE_SAMPLES", 4)
    model, gradients = tiny_model(), []
    model.get_input_embeddings().register_forward_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    found = run(
        model, importance_method="obs", num_samples=6, batch_size=2, collect_batches=1, repair="none", **options
    )
    assert sum(gradients) == backward_passes
    assert found.evidence.num_samples == 6
    assert ("group_fisher" in found.evidence.components) == (backward_passes == 3)
