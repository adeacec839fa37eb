import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_ids, tiny_model

from gradprune.checkpoint import save_checkpoint
from gradprune.errors import CalibrationError, NonFiniteError
from gradprune.evaluate import model_size, perplexity, throughput, weight_bytes_on_disk

TOKENS = tiny_ids(samples=1, tokens=107).flatten()


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_perplexity_equals_its_definition_at_any_batch_size(batch_size: int) -> None:
    model = tiny_model()
    found = perplexity(model, TOKENS, seq_len=10, batch_size=batch_size)
    nll = []
    with torch.no_grad():
        for start in range(0, 107, 10):
            window = TOKENS[start : start + 10]
            logits = model(window[None]).logits[0]
            nll += F.cross_entropy(logits[:-1], window[1:], reduction="none").tolist()
    assert found.tokens == len(nll) == 10 * 9 + 6
    assert found.windows == 11
    assert found.value == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-12)


def test_a_part_of_the_windows_is_spread_over_the_text() -> None:
    model = tiny_model()
    some = perplexity(model, TOKENS, seq_len=10, batch_size=4, max_windows=5)
    every_other = torch.cat([TOKENS[start : start + 10] for start in range(0, 100, 20)])
    assert some.windows == 5
    assert some.value == pytest.approx(perplexity(model, every_other, seq_len=10, batch_size=4).value, rel=1e-12)


def test_too_little_text_is_told() -> None:
    with pytest.raises(CalibrationError, match="107 held-out tokens are less than one window of 108"):
        perplexity(tiny_model(), TOKENS, seq_len=108, batch_size=1)


def test_a_nan_names_its_window() -> None:
    model = tiny_model()
    tokens = TOKENS.clone()
    tokens[(tokens == 60)] = 59
    tokens[45] = 60
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    with pytest.raises(NonFiniteError, match="evaluation window 4 is nan"):
        perplexity(model, tokens, seq_len=10, batch_size=3)


def test_throughput_alternates_its_models() -> None:
    order: list[str] = []
    models = {"a": tiny_model(), "b": tiny_model(layers=1)}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda _m, _a, name=name: order.append(name))
    found = throughput(models, seq_len=8, seed=0, repeats=3)
    assert order == ["a", "b"] * 5
    assert all(0 < speed.p20 <= speed.p50 <= speed.p80 for speed in found.values())


@pytest.mark.parametrize("tied", [False, True])
def test_tied_parameters_count_once(tied: bool) -> None:
    model = tiny_model(tied=tied)
    embeddings = model.config.vocab_size * model.config.hidden_size
    others = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    assert model_size(model).parameters == others + embeddings * (1 if tied else 2)
    assert model_size(model).bytes == 8 * model_size(model).parameters


def test_bytes_on_disk(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), None, tmp_path / "x")
    assert weight_bytes_on_disk(tmp_path / "x") == (tmp_path / "x" / "model.safetensors").stat().st_size
    assert weight_bytes_on_disk("some/hub-id") is None
