import logging
import sys

import pytest
import torch
from torch import Tensor

from gradprune.errors import BackendUnavailableError
from gradprune.ops.dispatch import grad_stats, gradient_ops_fault, scale_gradients, select_gradient_ops
from gradprune.ops.vectors import GradientStatistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["reference", "cpp", "auto"]


@pytest.fixture(autouse=True)
def _fresh_choice():
    select_gradient_ops.cache_clear()
    yield
    select_gradient_ops.cache_clear()


def _grads() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    grads = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((), (1,), (63,), (40, 130), (0, 5))
        for dtype in DTYPES
    ]
    grads[13][3, 4], grads[12][0, 0] = float("nan"), float("-inf")
    return [*grads, grads[12].T, grads[15][::3, 1::2]]


def _exact(grad: Tensor) -> GradientStatistics[float]:
    magnitude = grad.double().abs().reshape(-1)
    finite = magnitude[magnitude.isfinite()]
    extremes = (finite.max().item(), finite.min().item()) if finite.numel() else (0.0, float("inf"))
    non_finite = float(magnitude.numel() - finite.numel())
    return GradientStatistics(finite.sum().item(), finite.square().sum().item(), *extremes, non_finite)


def _assert_correct(found: GradientStatistics[Tensor], grads: list[Tensor]) -> None:
    """Allow 200 roundings: in a sum of up to 5200 terms, by halves or in lanes, a term is in far fewer additions."""
    for have, grad in zip(found.to_list(), grads, strict=True):
        want, unit = _exact(grad), 2.0**-53 if grad.dtype == torch.float64 else 2.0**-24
        assert have.sum_abs == pytest.approx(want.sum_abs, rel=200 * unit, abs=0.0)
        assert have.sum_square == pytest.approx(want.sum_square, rel=200 * unit, abs=0.0)
        assert (have.max_abs, have.min_abs, have.non_finite) == (want.max_abs, want.min_abs, want.non_finite)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_by_every_cpu_backend(backend: str) -> None:
    grads = _grads()
    found = grad_stats(grads, backend)
    assert found.pack().dtype == torch.float64
    _assert_correct(found, grads)
    assert grad_stats([], backend).to_list() == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaling_by_every_cpu_backend(backend: str) -> None:
    grads = [grad.clone() for grad in _grads()]
    scales = [(-1.0) ** k * 0.3 * (k + 1) for k in range(len(grads))]
    scales[2] = 1.0
    # The product of two fp32 numbers is exact in fp64.
    products = [
        grad * scale if grad.dtype == torch.float64 else grad.double() * torch.tensor(scale, dtype=torch.float32)
        for grad, scale in zip(grads, scales, strict=True)
    ]
    expected = [product.float().to(g.dtype) if g.dtype != torch.float64 else product
                for product, g in zip(products, grads, strict=True)]  # fmt: skip
    expected[2] = grads[2].clone()
    scale_gradients(grads, scales, backend)
    for grad, product in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, product, rtol=0.0, atol=0.0, equal_nan=True)
    scale_gradients([], [], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaling_is_seen_by_autograd(backend: str) -> None:
    parameter = torch.ones(4, requires_grad=True)
    squared = parameter.square().sum()
    scale_gradients([parameter], [2.0], backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_1_leaves_the_gradient_untouched(backend: str) -> None:
    grads = [torch.ones(4), torch.ones(4)]
    scale_gradients(grads, [1.0, 2.0], backend)
    assert [grad._version for grad in grads] == [0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mismatched_scales_and_devices_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="scales: has 1 entries for 2 gradients"):
        scale_gradients([torch.ones(1), torch.ones(1)], [1.0], backend)
    with pytest.raises(ValueError, match="grads: are on cpu, meta; all must be on one device"):
        grad_stats([torch.ones(1), torch.ones(1, device="meta")], backend)


def test_auto_falls_back_and_says_why_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "gradprune._C", None)
    with caplog.at_level(logging.INFO, "gradprune"):
        for _ in range(2):
            assert grad_stats([torch.ones(3)]).to_list() == [GradientStatistics(3.0, 3.0, 1.0, 1.0, 0.0)]
    assert len(caplog.records) == 1
    assert "'cpp' cannot run: the extension gradprune._C does not import" in caplog.text
    assert select_gradient_ops("auto", "cuda").backend == "reference"


def test_a_backend_asked_for_by_name_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("reference", "cpp"):
        assert select_gradient_ops(backend, "cpu").backend == backend
    grads = [torch.ones(2)]
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot run on cpu: the CUDA kernels work on CUDA"):
        grad_stats(grads, "cuda")
    with pytest.raises(
        BackendUnavailableError, match="'triton' cannot run on cpu: it has no gradient ops; choose auto"
    ):
        scale_gradients(grads, [2.0], "triton")
    with pytest.raises(BackendUnavailableError, match="'cpp' cannot run on cuda: the C\\+\\+ kernels work on CPU"):
        select_gradient_ops("cpp", "cuda")
    monkeypatch.setitem(sys.modules, "gradprune._C", None)
    for backend, device in (("cpp", "cpu"), ("cuda", "cuda")):
        select_gradient_ops.cache_clear()
        with pytest.raises(BackendUnavailableError, match=f"'{backend}' cannot run on {device}: the extension"):
            select_gradient_ops(backend, device)


def test_the_cuda_backend_reports_what_it_lacks() -> None:
    _C = pytest.importorskip("gradprune._C", reason="the extension is not built")
    fault = gradient_ops_fault("cuda", "cuda")
    if not _C.build_info()["cuda"]:
        assert fault
        assert "built without a CUDA compiler" in fault
    elif not torch.cuda.is_available():
        assert fault  # the CUDA runtime's own words: no driver, or no device
        with pytest.raises(BackendUnavailableError, match="'cuda' cannot run"):
            grad_stats([], "cuda")
    else:
        assert fault is None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "cuda", "auto"])
def test_statistics_and_scaling_by_every_gpu_backend(backend: str) -> None:
    if gradient_ops_fault("cuda", "cuda"):
        pytest.skip(f"cuda is NOT tested here: {gradient_ops_fault('cuda', 'cuda')}")
    grads = [grad.cuda() for grad in _grads()]
    assert select_gradient_ops(backend, "cuda").backend == (backend if backend != "auto" else "cuda")
    _assert_correct(grad_stats(grads, backend), grads)
    expected = [grad * 0.3 for grad in grads]
    scale_gradients(grads, [0.3] * len(grads), backend)
    for grad, product in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, product, rtol=0.0, atol=0.0, equal_nan=True)
