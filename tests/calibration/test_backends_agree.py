"""Every backend on whole models: the same scores as the reference, in the same order."""

import pytest
import torch

from gradprune.calibration.engine import ImportanceEngine, Scores
from gradprune.config import ImportanceBackend
from helpers.devices import require_backend
from helpers.tiny_models import tiny_ids, tiny_model

ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3")
METHODS = ("taylor", "fisher", "taylor_2nd", "group_fisher")


def scores_by_method(model, ids: torch.Tensor, backend: ImportanceBackend) -> dict[str, Scores]:
    with ImportanceEngine(model, "taylor_2nd", backend=backend) as engine:
        for batch in ids.split(2):
            engine.step(batch)
    return {method: engine.scores(method) for method in METHODS}


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_and_their_order_equal_the_references(
    architecture: str, backend: ImportanceBackend, device: str
) -> None:
    require_backend(backend, device)
    model = tiny_model(architecture, layers=2, channels=37, dtype=torch.float32).to(device)
    ids = tiny_ids(samples=3, tokens=17)
    expected, found = (scores_by_method(model, ids, name) for name in ("reference", backend))
    for method in METHODS:
        for kind in ("attention", "mlp"):
            want, have = (torch.cat(getattr(scores[method], kind)) for scores in (expected, found))
            # The backends add at most 40 * 72 fp32 terms, from gradients over 17 tokens, in different orders.
            torch.testing.assert_close(have, want, rtol=1e-5, atol=0.0)
            assert torch.equal(have.argsort(), want.argsort()), (method, kind)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cpp_gives_the_same_bits_with_one_thread_and_two(architecture: str, restore_threads: None) -> None:
    model = tiny_model(architecture, head_dim=32, channels=700, hidden=192, dtype=torch.float32)
    ids = tiny_ids(samples=2, tokens=60)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(scores_by_method(model, ids, "cpp"))
    for method in METHODS:
        one, two = (scores[method].attention + scores[method].mlp for scores in results)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), method
