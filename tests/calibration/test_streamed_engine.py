"""The engine on a streamed model: the scores of the whole model, bit for bit, whatever the waves."""

import itertools

import pytest
import torch

from gradprune.calibration.engine import ImportanceEngine
from gradprune.calibration.priors import removal_priors, similarity_priors
from gradprune.checkpoint.load import load_shape
from gradprune.config import PruneConfig
from gradprune.errors import ConfigError, NonFiniteError
from gradprune.models import describe
from gradprune.models.footprint import STAGES, Job
from gradprune.models.residency import residency_of
from helpers.streaming import both, saved
from helpers.tiny_models import ARCHITECTURE_NAMES, METHODS, tiny_ids, tiny_model


def evidence(model, batches, method="obs", waves=None):
    with ImportanceEngine(model, method, backend="reference", use_gradient_checkpointing=True) as engine:
        for wave in waves if waves is not None else engine.waves(batches):
            engine.steps(wave)
    return engine.evidence(steps=3)


def assert_same(found, expected) -> None:
    assert found.gradients == expected.gradients
    assert found.steps == expected.steps
    assert found.components.keys() == expected.components.keys()
    for name, values in expected.components.items():
        assert torch.equal(found.components[name], values), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_evidence_has_the_same_bits_as_the_whole_model(architecture: str, dtype: torch.dtype, tmp_path) -> None:
    whole, streamed = both(tiny_model(architecture, dtype=dtype), tmp_path)
    batches = list(tiny_ids(samples=5).split(2))
    assert_same(evidence(streamed, batches), evidence(whole, batches))


@pytest.mark.parametrize("cuts", [(4,), (1, 1, 1, 1), (3, 1)])
def test_waves_change_nothing(cuts: tuple[int, ...], tmp_path) -> None:
    whole, streamed = both(tiny_model(), tmp_path)
    batches = tiny_ids(samples=7).split(2)
    edges = [sum(cuts[:n]) for n in range(len(cuts) + 1)]
    waves = [list(batches[start:end]) for start, end in itertools.pairwise(edges)]
    assert_same(evidence(streamed, batches, waves=waves), evidence(whole, list(batches)))


def test_stream_memory_divides_the_samples_into_waves(tmp_path) -> None:
    saved(tiny_model(hidden=16), tmp_path)
    batches = list(tiny_ids(samples=6).split(2))
    # A batch's stream is 2 samples x 9 tokens x 96 x 8 bytes = 13,824 bytes, kept at 4 boundaries.
    for memory, sizes in (("1B", [1, 1, 1]), ("111KB", [2, 1]), ("1MiB", [3])):
        engine = ImportanceEngine.from_checkpoint(tmp_path, stream_layers="on", stream_memory=memory)
        assert [len(wave) for wave in engine.waves(batches)] == sizes


def test_auto_streams_only_if_calibration_would_not_fit(tmp_path, monkeypatch) -> None:
    saved(tiny_model(dtype=torch.float32), tmp_path)
    shape, cpu = load_shape(tmp_path), torch.device("cpu")

    def needed(method: str, *stages: str) -> int:
        config = PruneConfig(importance_method=method, use_gradient_checkpointing=True)
        return Job(config, stages or STAGES).footprint(shape, streamed=False, device=cpu).peak

    def streams(method: str, free: int) -> bool:
        monkeypatch.setattr("gradprune.checkpoint.load.free_memory", lambda _device: free)
        engine = ImportanceEngine.from_checkpoint(tmp_path, method, stream_layers="auto")
        return residency_of(engine.model) is not None

    for method in ("group_fisher", "obs"):
        enough = needed(method, "calibration", "importance")
        assert enough < needed(method)
        assert not streams(method, enough)
        assert streams(method, enough - 1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_scores_as_with_the_whole_model(method: str, tmp_path) -> None:
    whole, streamed = both(tiny_model(), tmp_path)
    batches = list(tiny_ids(samples=4).split(2))
    found, expected = (evidence(model, batches, method).scores(method) for model in (streamed, whole))
    for kind in ("attention", "mlp"):
        for one, other in zip(getattr(found, kind), getattr(expected, kind), strict=True):
            assert torch.equal(one, other)


def test_priors_have_the_same_bits(tmp_path) -> None:
    whole, streamed = both(tiny_model(), tmp_path, stream_memory="60KB")
    batches = list(tiny_ids(samples=4).split(2))
    for priors in (removal_priors, similarity_priors):
        calls: list[int] = []
        found = priors(describe(streamed), batches, lambda calls=calls: calls.append(1))
        assert found == priors(describe(whole), batches, lambda: None)
        assert calls


def test_each_layer_runs_twice_for_each_batch(tmp_path) -> None:
    """Once in the forward pass, without gradients, and again in the backward pass, even if not asked to recompute."""
    _, streamed = both(tiny_model(), tmp_path)
    calls: list[int] = []
    for layer, module in enumerate(streamed.model.layers):
        module.mlp.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    batches = list(tiny_ids(samples=4).split(2))
    evidence(streamed, batches, "group_fisher")
    # To learn what a layer returns, the first one runs once more.
    assert sorted(calls) == sorted([0, *(4 * [0, 1, 2])])


def test_a_wave_that_fails_has_no_effect(tmp_path) -> None:
    whole, streamed = both(tiny_model(), tmp_path)
    batches = list(tiny_ids(samples=6).split(2))
    with ImportanceEngine(streamed, "obs", backend="reference") as engine:
        engine.steps(batches[:1])
        with torch.no_grad():
            streamed.model.norm.weight.mul_(torch.inf)
        with pytest.raises(NonFiniteError, match="sample 2"):
            engine.steps(batches[1:])
        streamed.model.norm.weight.copy_(whole.model.norm.weight)
        engine.steps(batches[1:])
    assert_same(engine.evidence(steps=3), evidence(whole, batches))


def test_batch_reduction_is_refused_with_the_reason(tmp_path) -> None:
    _, streamed = both(tiny_model(), tmp_path)
    with pytest.raises(ConfigError, match="reduction: 'batch' keeps a gradient of every weight"):
        ImportanceEngine(streamed, reduction="batch")


def test_a_wave_that_is_interrupted_within_a_layer_has_no_effect(tmp_path) -> None:
    """In the backward pass, between the layer's MLP and its attention."""

    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    whole, streamed = both(tiny_model(), tmp_path)
    batches = list(tiny_ids(samples=6).split(2))
    with ImportanceEngine(streamed, "obs", backend="reference") as engine:
        engine.steps(batches[:1])
        handle = streamed.model.layers[1].self_attn.o_proj.register_full_backward_pre_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.steps(batches[1:])
        handle.remove()
        engine.steps(batches[1:])
    assert_same(engine.evidence(steps=3), evidence(whole, batches))
