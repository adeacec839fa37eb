import pytest
import torch

from benchmarks.inference.speed import decode_throughput
from gradprune.evaluation import speed as speed_module
from helpers.tiny_models import tiny_model


def test_generation_is_timed_with_a_cache_to_its_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []
    models = {"a": tiny_model(), "b": tiny_model(layers=1)}
    for name, model in models.items():
        with torch.no_grad():
            # All logits are 0, so that greedy decoding would always choose token 0, the end of text.
            model.model.norm.weight.zero_()
        model.generation_config.eos_token_id = 0
        model.register_forward_pre_hook(
            lambda _m, _a, kwargs, name=name: order.append((name, kwargs["input_ids"].shape[1])), with_kwargs=True
        )
    seconds = iter(float(second) for second in range(100))
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: next(seconds))
    found = decode_throughput(models, prompt_len=5, new_tokens=3, batch_size=2, seed=0, repeats=2)
    assert order == [("a", 5), ("a", 1), ("a", 1), ("b", 5), ("b", 1), ("b", 1)] * 4
    assert {speed.p50 for speed in found.values()} == {6.0}
