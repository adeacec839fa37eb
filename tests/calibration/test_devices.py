"""The engine on every device: its scores equal those by fp64 autograd, and are the same bits every time."""

import pytest
import torch

from gradprune.calibration.engine import ImportanceEngine, Scores
from gradprune.calibration.gram import add_product
from gradprune.config import Method
from helpers.engine_runs import run_engine
from helpers.oracle import oracle_scores
from helpers.tiny_models import tiny_ids, tiny_model

# Relative to the oracle in fp64. Squares of sums whose terms nearly cancel, and results of an inverse, are less exact.
TOLERANCE: dict[Method, float] = {
    "taylor_2nd": 1e-5, "fisher": 1e-5, "group_fisher": 3e-5, "wanda": 1e-5, "magnitude": 1e-5, "obs": 1e-3
}  # fmt: skip
second_gpu = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has fewer than two GPUs")


def bits(scores: Scores) -> torch.Tensor:
    return torch.cat([*scores.attention, *scores.mlp])


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("method", TOLERANCE)
def test_every_group_equals_fp64_autograd(device: str, method: Method, architecture: str) -> None:
    model, ids = tiny_model(architecture, layers=2, dtype=torch.float32), tiny_ids(tokens=17)
    expected = torch.cat([block for kind in oracle_scores(model, ids, method, "sample", 2) for block in kind])
    found = run_engine(model.to(device), ids, method, backend="auto")
    torch.testing.assert_close(bits(found).double(), expected, rtol=TOLERANCE[method], atol=0.0)


@pytest.mark.parametrize("method", ["taylor_2nd", "group_fisher"])
@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_every_group_of_an_fp64_model_equals_fp64_autograd(device: str, reduction: str, method: Method) -> None:
    """In fp64 no attention on a GPU is fused, and no Triton kernel takes part."""
    model, ids = tiny_model(layers=2), tiny_ids()
    expected = torch.cat([block for kind in oracle_scores(model, ids, method, reduction, 2) for block in kind])
    found = run_engine(model.to(device), ids, method, reduction)
    torch.testing.assert_close(bits(found).double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_follows_fp64(device: str, half: torch.dtype) -> None:
    model, ids = tiny_model(layers=2, channels=32, head_dim=16, dtype=half), tiny_ids(tokens=17)
    expected = torch.cat([block for kind in oracle_scores(model, ids, "taylor_2nd", "sample", 2) for block in kind])
    found = bits(run_engine(model.to(device), ids, "taylor_2nd", backend="auto")).double()
    # Values have 8 or 11 significant bits, and their errors pass through two layers.
    assert (found - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(device: str, dtype: torch.dtype, recompute: bool) -> None:
    model, options = tiny_model(layers=2, head_dim=16, dtype=dtype).to(device), {"backend": "auto"}
    runs = (run_engine(model, tiny_ids(tokens=33), use_gradient_checkpointing=recompute, **options) for _ in range(2))
    assert torch.equal(*map(bits, runs))


@pytest.mark.gpu
@second_gpu
def test_a_model_on_the_second_gpu_scores_as_on_the_first() -> None:
    model, ids = tiny_model(layers=2, dtype=torch.float32), tiny_ids(tokens=17)
    first, second = (bits(run_engine(model.to(name), ids, backend="triton")) for name in ("cuda:0", "cuda:1"))
    assert torch.equal(first, second)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("total", [torch.float32, torch.float64])
def test_products_of_half_precision_are_summed_exactly(device: str, half: torch.dtype, total: torch.dtype) -> None:
    """Small integers, whose products and sums half precision could not hold."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-16, 17, (200, width), generator=generator).to(device, half) for width in (7, 130))
    found = torch.ones(7, 130, dtype=total, device=device)
    add_product(found, left, right)
    assert torch.equal(found, 1.0 + (left.double().T @ right.double()).to(total))


def test_input_ids_may_be_int32_and_on_any_device(device: str) -> None:
    model, ids = tiny_model(layers=1, dtype=torch.float32).to(device), tiny_ids()
    with ImportanceEngine(model, backend="auto") as engine:
        engine.step(ids.to(torch.int32))
    on_device = run_engine(model, ids.to(device), "group_fisher", batch_size=4, backend="auto")
    assert torch.equal(bits(engine.scores()), bits(on_device))
