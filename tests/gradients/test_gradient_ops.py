import logging

import pytest
import torch

from gradprune.errors import BackendUnavailableError
from gradprune.gradients.cuda import RUN_ELEMENTS, run_table
from gradprune.gradients.ops import _select, grad_stats, scale_gradients, unavailable_reason

SIZES = [0, 1, 63, 65, 65535, 65536, 65537, 200_000]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _fresh_choice():
    _select.cache_clear()
    yield
    _select.cache_clear()


def gradients(device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(size, generator=generator).to(dtype).to(device) for dtype in DTYPES for size in SIZES]
    # A view that begins where no 16 bytes do, a transposed one, and one with gaps.
    wide = torch.randn(60, 70, generator=generator).to(device)
    made += [made[5][1:], wide.T, wide[::2, 1::3]]
    made[3][7], made[3][8] = float("nan"), float("inf")
    return made


def expected_statistics(g: torch.Tensor) -> list[float]:
    magnitude = g.double().abs().cpu().flatten()
    finite = magnitude[magnitude.isfinite()]
    if not len(finite):
        return [0.0, 0.0, 0.0, float("inf"), float(len(magnitude))]
    bad = len(magnitude) - len(finite)
    return [finite.sum().item(), finite.square().sum().item(), finite.max().item(), finite.min().item(), float(bad)]


def assert_statistics(found: torch.Tensor, grads: list[torch.Tensor]) -> None:
    assert found.dtype == torch.float64
    for row, grad in zip(found.cpu().tolist(), grads, strict=True):
        # Sums of n positive fp32 terms, in whatever order, are right to n * 2^-24; at most 4096 meet in fp32.
        assert row == pytest.approx(expected_statistics(grad), rel=4096 * 2.0**-24)


@pytest.mark.parametrize("backend", ["reference", "cpp", "auto"])
def test_statistics_of_every_backend(backend: str) -> None:
    grads = gradients()
    assert_statistics(grad_stats(grads, backend), grads)
    assert grad_stats([], backend).shape == (0, 5)


@pytest.mark.parametrize("backend", ["reference", "cpp", "auto"])
def test_scaling_of_every_backend(backend: str) -> None:
    grads, twins = gradients(), gradients()
    # Views into others of the list would be scaled twice.
    grads, twins = grads[:-3], twins[:-3]
    scales = [1.0 if k % 5 == 0 else 0.37 * (k + 1) for k in range(len(grads))]
    scale_gradients(grads, scales, backend)
    for grad, twin, scale in zip(grads, twins, scales, strict=True):
        assert torch.equal(grad.nan_to_num(), (twin * scale).nan_to_num())


def test_a_backend_is_used_or_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot run on cpu: the CUDA kernels work on CUDA"):
        grad_stats(gradients(), "cuda")
    with pytest.raises(BackendUnavailableError, match="no Triton kernel"):
        scale_gradients([torch.ones(2)], [2.0], "triton")
    with pytest.raises(ValueError, match="scales: has 1 entries for 0 gradients"):
        scale_gradients([], [1.0])
    assert unavailable_reason("cpp", "cuda") == "the C++ kernels work on CPU tensors"


def test_auto_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("gradprune.gradients.ops.extension_fault", lambda: "it is broken")
    with caplog.at_level(logging.INFO, "gradprune"):
        assert_statistics(grad_stats(gradients()), gradients())
        grad_stats(gradients())
    assert [record.message for record in caplog.records] == [
        "backend 'auto' uses 'reference' on cpu: 'cpp' cannot run: it is broken"
    ]


def test_runs_cover_every_element_once() -> None:
    grads = [torch.empty(size, dtype=torch.bfloat16) for size in SIZES]
    table, first_run = run_table(grads)
    for k, grad in enumerate(grads):
        own = table[first_run[k] : first_run[k + 1]].tolist()
        position = grad.data_ptr()
        for address, count, _, owner in own:
            assert (address, owner) == (position, k)
            assert 0 < count <= RUN_ELEMENTS
            position += count * 2
        assert position == grad.data_ptr() + 2 * grad.numel()
    assert first_run[-1] == len(table) == sum(-(-size // RUN_ELEMENTS) for size in SIZES)


@pytest.mark.gpu
def test_cuda_statistics() -> None:
    grads = gradients("cuda")
    found = grad_stats(grads, "cuda")
    assert_statistics(found, grads)
    for _ in range(250):
        assert torch.equal(grad_stats(grads, "cuda"), found)


@pytest.mark.gpu
def test_cuda_scaling_on_another_stream() -> None:
    grads, twins = gradients("cuda")[:-3], gradients("cuda")[:-3]
    scales = [1.0 if k % 5 == 0 else 0.37 * (k + 1) for k in range(len(grads))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        scale_gradients(grads, scales, "cuda")
    stream.synchronize()
    for grad, twin, scale in zip(grads, twins, scales, strict=True):
        assert torch.equal(grad.nan_to_num(), (twin * scale).nan_to_num())
