from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradprune.calibration.accumulator import StepRecord, absolute_sums
from gradprune.calibration.engine import ImportanceEngine, Scores
from gradprune.calibration.finite import raise_overflow
from gradprune.config import GRADIENT_METHODS
from gradprune.errors import BackendUnavailableError, ConfigError, GradPruneError, NonFiniteError
from gradprune.models import BlockKey
from gradprune.ops.vectors import GradientStatistics
from helpers.engine_runs import run_engine
from helpers.oracle import oracle_layer_statistics, oracle_scores
from helpers.tiny_models import ARCHITECTURE_NAMES, GQA_RATIOS, METHODS, tiny_ids, tiny_model


def assert_scores_close(scores: Scores, expected, rtol: float) -> None:
    for kind, blocks in zip(("attention", "mlp"), expected, strict=True):
        for layer, block in enumerate(blocks):
            found = getattr(scores, kind)[layer].double()
            assert torch.allclose(found, block, rtol=rtol, atol=0.0), (kind, layer, found, block)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("method", METHODS)
def test_every_group_equals_fp64_autograd(architecture: str, method: str, reduction: str, backend: str) -> None:
    model, ids = tiny_model(architecture), tiny_ids()
    scores = run_engine(model, ids, method, reduction, backend=backend)
    # The engine computes in fp64 here and returns fp32: half an ulp is 6e-8.
    assert_scores_close(scores, oracle_scores(model, ids, method, reduction, 2), rtol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "obs"])  # see the next test
def test_an_fp32_model_is_exact_to_1e_5(method: str, backend: str) -> None:
    model, ids = tiny_model("llama", channels=33, dtype=torch.float32), tiny_ids(samples=6, tokens=17)
    assert_scores_close(
        run_engine(model, ids, method, backend=backend), oracle_scores(model, ids, method, "sample", 2), rtol=1e-5
    )


def test_removal_costs_of_an_fp32_model_are_as_exact_as_an_inverse_allows() -> None:
    """The Gram matrix is summed in fp32, and its condition number is 1e2 to 1e3 here."""
    model, ids = tiny_model("llama", channels=30, dtype=torch.float32), tiny_ids(samples=6, tokens=17)
    assert_scores_close(run_engine(model, ids, "obs"), oracle_scores(model, ids, "obs", "sample", 2), rtol=1e-3)


@pytest.mark.parametrize("ratio", GQA_RATIOS)
def test_every_gqa_ratio_equals_fp64_autograd(ratio: int) -> None:
    model, ids = tiny_model("qwen2", kv_heads=2, ratio=ratio), tiny_ids()
    assert_scores_close(run_engine(model, ids), oracle_scores(model, ids, "taylor_2nd", "sample", 2), rtol=1e-6)


@settings(max_examples=10)
@given(cuts=st.sets(st.integers(1, 6)), method=st.sampled_from(GRADIENT_METHODS))
def test_any_batch_split_gives_the_same_scores(cuts: set[int], method: str) -> None:
    model, ids = tiny_model("llama"), tiny_ids(samples=7)
    whole = run_engine(model, ids, method, batch_size=7)
    edges = [0, *sorted(cuts), 7]
    with ImportanceEngine(model, method, backend="reference") as engine:
        for start, end in pairwise(edges):
            engine.step(ids[start:end])
    assert_scores_close(engine.scores(), ([a.double() for a in whole.attention], [m.double() for m in whole.mlp]), 1e-6)


def test_steps_may_have_samples_of_different_lengths() -> None:
    model = tiny_model()
    with ImportanceEngine(model, "fisher", backend="reference") as engine:
        for tokens in (5, 9):
            engine.step(tiny_ids(samples=2, tokens=tokens))
    apart = [run_engine(model, tiny_ids(samples=2, tokens=tokens), "fisher") for tokens in (5, 9)]
    mean = (apart[0].mlp[0] + apart[1].mlp[0]) / 2
    torch.testing.assert_close(engine.scores().mlp[0], mean, rtol=1e-6, atol=0.0)


def test_batch_reduction_depends_on_the_split() -> None:
    model, ids = tiny_model(), tiny_ids()
    ones = run_engine(model, ids, "fisher", "batch", batch_size=1)
    pairs = run_engine(model, ids, "fisher", "batch", batch_size=2)
    assert not torch.allclose(ones.mlp[0], pairs.mlp[0], rtol=0.05)


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_gradient_checkpointing_changes_nothing(architecture: str) -> None:
    model, ids = tiny_model(architecture), tiny_ids()
    plain, checkpointed = (run_engine(model, ids, use_gradient_checkpointing=flag) for flag in (False, True))
    assert_scores_close(
        checkpointed, ([a.double() for a in plain.attention], [m.double() for m in plain.mlp]), rtol=1e-6
    )
    assert all("forward" not in vars(module) for module in model.modules())


def test_checkpointing_recomputes_the_layers() -> None:
    model, calls = tiny_model(), []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    run_engine(model, tiny_ids(), batch_size=4, use_gradient_checkpointing=True)
    assert len(calls) == 2


@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
@pytest.mark.parametrize("ratio", GQA_RATIOS)
def test_planted_dead_groups_score_lowest(architecture: str, ratio: int) -> None:
    for seed in range(20):
        model = tiny_model(architecture, kv_heads=3, ratio=ratio, channels=7, layers=2, dtype=torch.float32, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        dead_heads, dead_channels = _plant_dead_groups(model, ratio, generator)
        with ImportanceEngine(model, "obs", backend="reference") as engine:
            engine.step(tiny_ids(samples=2, seed=seed))
        for method in GRADIENT_METHODS:
            scores = engine.scores(method)
            for layer in range(2):
                for values, dead in ((scores.attention[layer], dead_heads), (scores.mlp[layer], dead_channels)):
                    alive = [group for group in range(len(values)) if group not in dead[layer]]
                    assert values[sorted(dead[layer])].max() < values[alive].min(), (method, seed, layer)


def _plant_dead_groups(model, ratio, generator):
    """Zero what one KV group and two MLP channels of each layer write; return their indices by layer."""
    heads, channels = [], []
    with torch.no_grad():
        for layer in model.model.layers:
            width = ratio * layer.self_attn.head_dim
            head = int(torch.randint(3, (), generator=generator))
            layer.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0.0
            rows = layer.self_attn.head_dim
            if hasattr(layer.self_attn, "v_proj"):
                layer.self_attn.v_proj.weight[head * rows : (head + 1) * rows] = 0.0
                if layer.self_attn.v_proj.bias is not None:
                    layer.self_attn.v_proj.bias[head * rows : (head + 1) * rows] = 0.0
            dead = torch.randperm(7, generator=generator)[:2]
            layer.mlp.down_proj.weight[:, dead] = 0.0
            heads.append({head})
            channels.append(set(dead.tolist()))
    return heads, channels


def test_scores_of_another_method_need_no_second_pass() -> None:
    model, ids = tiny_model(), tiny_ids()
    with ImportanceEngine(model, "obs", backend="reference") as engine:
        engine.step(ids)
    for method in METHODS:
        assert_scores_close(engine.scores(method), oracle_scores(model, ids, method, "sample", 4), rtol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_layer_statistics_equal_fp64_autograd(architecture: str) -> None:
    model, ids = tiny_model(architecture), tiny_ids()
    for layer, found in enumerate(run_engine(model, ids).gradients):
        expected = oracle_layer_statistics(model, ids, layer)
        assert found.layer == layer
        for name, value in expected.items():
            assert getattr(found, name) == pytest.approx(value, rel=1e-6), (layer, name)
        assert found.norm == pytest.approx(sum(n**2 for n in found.parameter_norms.values()) ** 0.5)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model().train()
    model.model.norm.weight.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    run_engine(model, tiny_ids())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())


def test_the_model_is_restored_when_a_step_fails() -> None:
    model = tiny_model()
    engine = ImportanceEngine(model, backend="reference")
    with pytest.raises(RuntimeError, match="boom"), engine:
        raise RuntimeError("boom")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())
    assert not model.get_input_embeddings()._forward_hooks


def test_no_gradient_is_kept_while_the_engine_is_open() -> None:
    model = tiny_model()
    with ImportanceEngine(model, backend="reference") as engine:
        engine.step(tiny_ids())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_bf16_weights_follow_fp32_scores() -> None:
    model, ids = tiny_model(channels=32, dtype=torch.bfloat16), tiny_ids(samples=8)
    scores = run_engine(model, ids)
    expected = oracle_scores(model, ids, "taylor_2nd", "sample", 2)
    # bf16 rounds to 2^-8 at each of the forward and backward operations; group sums average that out.
    assert_scores_close(scores, expected, rtol=0.15)


def test_autocast_follows_fp32_scores() -> None:
    model, ids = tiny_model(channels=32, dtype=torch.float32), tiny_ids(samples=8)
    with torch.autocast("cpu", torch.bfloat16):
        scores = run_engine(model, ids)
    assert_scores_close(scores, oracle_scores(model, ids, "taylor_2nd", "sample", 2), rtol=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_run_gives_the_same_bits(method: str) -> None:
    model, ids = tiny_model(dtype=torch.float32), tiny_ids()
    first, second = run_engine(model, ids, method), run_engine(model, ids, method)
    pairs = zip(first.attention + first.mlp, second.attention + second.mlp, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_nan_weight_is_an_error_naming_sample_and_layer() -> None:
    model = tiny_model(layers=4)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"sample 0 is nan, first in the output of layer 2"):
        run_engine(model, tiny_ids())


def test_an_infinite_loss_of_one_sample_names_that_sample() -> None:
    model, ids = tiny_model(layers=2), tiny_ids(samples=5)
    ids[3] = 59
    with torch.no_grad():
        model.model.embed_tokens.weight[59] = float("inf")
    assert not (ids[:3] == 59).any()
    with pytest.raises(NonFiniteError, match="sample 3 is"):
        run_engine(model, ids)


def test_a_nan_gradient_with_finite_loss_names_sample_and_layer() -> None:
    model, ids = tiny_model(layers=3), tiny_ids()

    def poison(_module, _inputs, output):
        output.register_hook(lambda g: g.masked_fill(torch.ones_like(g).cumsum(0) == 2, float("nan")))

    with ImportanceEngine(model, backend="reference") as engine:
        model.model.layers[1].register_forward_hook(poison)
        with pytest.raises(NonFiniteError, match=r"gradient of calibration sample 1 is nan in layer 1 \(mlp\)"):
            engine.step(ids)


@pytest.mark.parametrize(("sum_abs", "non_finite"), [(float("inf"), 0.0), (float("nan"), 0.0), (1.0, 2.0)])
def test_an_overflow_in_a_weight_gradient_names_the_projection(sum_abs: float, non_finite: float) -> None:
    """This holds whether a backend counts such elements or only sums them up, and if only a later step has any."""
    right = GradientStatistics.unpack(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    wrong = GradientStatistics.unpack(torch.tensor([sum_abs, 1.0, 1.0, 0.0, non_finite]))
    records = {BlockKey(1, "mlp"): [StepRecord({"up_proj": right}), StepRecord({"up_proj": wrong})]}
    with pytest.raises(NonFiniteError, match="elements of layer 1's up_proj overflow"):
        raise_overflow(records)
    raise_overflow({BlockKey(1, "mlp"): [StepRecord({"up_proj": right}), StepRecord()]})


def test_misuse_is_an_error_with_a_reason() -> None:
    model = tiny_model()
    engine = ImportanceEngine(model, backend="reference")
    with pytest.raises(GradPruneError, match="with engine"):
        engine.step(tiny_ids())
    with pytest.raises(GradPruneError, match=r"call step"):
        engine.scores()
    with pytest.raises(ConfigError, match="importance_method: 'nonsense'"):
        ImportanceEngine(model, "nonsense")
    with pytest.raises(ConfigError, match="reduction: 'mean'"):
        ImportanceEngine(model, reduction="mean")
    with pytest.raises(BackendUnavailableError, match="backend: 'cuda' cannot run on cpu"):
        ImportanceEngine(model, backend="cuda")
    forward_only = ImportanceEngine(model, "wanda", backend="reference")
    with forward_only:
        forward_only.step(tiny_ids())
    with pytest.raises(GradPruneError, match="'taylor' needs gradients"):
        forward_only.scores("taylor")


def test_magnitude_needs_no_calibration() -> None:
    model = tiny_model()
    scores = ImportanceEngine(model, "magnitude").scores()
    assert_scores_close(scores, oracle_scores(model, tiny_ids(), "magnitude", "sample", 2), rtol=1e-6)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("at_once", [1, 20, 45, 1000])
def test_absolute_sums_do_not_depend_on_how_many_elements_are_summed_at_a_time(
    dim: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradprune.calibration.accumulator.FOLDED", at_once)
    weight = torch.randn(9, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = absolute_sums(weight, dim)
    torch.testing.assert_close(found, weight.detach().double().abs().sum(dim), rtol=1e-14, atol=0.0)
    assert not found.requires_grad
