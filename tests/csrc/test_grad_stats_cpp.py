"""grad_stats in C++ against sums in 80-bit floating point.

Tolerance. At most 4096 elements are summed in T (fp64 for fp64, else fp32) over at least 2 lanes, and these sums are
summed in fp64. So a term passes through at most L = min(n, 2048 + 31 + 8) roundings of relative size u in T (2^-53 or
2^-24) and n / 4096 of relative size 2^-53; a square passes through one more:

    |computed - exact| <= ((L + 4) u + (n / 4096 + 4) 2^-53) sum |term|
"""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from gradprune.ops.cpp import grad_stats_cpp
from gradprune.ops.extension import dtype_code
from gradprune.ops.vectors import GradientStatistics

pytest.importorskip("gradprune._C", reason="the extension is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [0, 1, 63, 127, 128, 129, 4095, 4097, 65535, 65536, 65537, 200_000]


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _assert_correct(found: GradientStatistics[float], g: Tensor) -> None:
    magnitude = np.abs(g.double().numpy().astype(np.longdouble)).reshape(-1)
    magnitude = magnitude[np.isfinite(magnitude)]
    unit = 2.0**-53 if g.dtype == torch.float64 else 2.0**-24
    bound = (min(g.numel(), 2087) + 4) * unit + (g.numel() / 4096 + 4) * 2.0**-53
    for value, exact in ((found.sum_abs, magnitude.sum()), (found.sum_square, (magnitude * magnitude).sum())):
        assert abs(value - exact) <= bound * exact
    assert found.max_abs == (magnitude.max() if magnitude.size else 0.0)
    assert found.min_abs == (magnitude.min() if magnitude.size else np.inf)
    assert found.non_finite == g.numel() - magnitude.size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_exact_sums(dtype: torch.dtype, isa: str):
    grads = [_random((size,), dtype, size) for size in SIZES]
    found = grad_stats_cpp(grads, isa)
    assert found.pack().shape == (len(SIZES), 5)
    assert found.pack().dtype == torch.float64
    for of_one, grad in zip(found.to_list(), grads, strict=True):
        _assert_correct(of_one, grad)


def test_mixed_dtypes_shapes_and_strides(isa: str):
    base = _random((60, 90), torch.float32, 1)
    grads = [base, base.T, base[::2, 1::3], base.bfloat16(), base[:, :1].expand(60, 70), base[0, 0], base.double()]
    found = grad_stats_cpp(grads, isa).to_list()
    for of_one, grad in zip(found, grads, strict=True):
        _assert_correct(of_one, grad)
    assert found[0] == found[1]  # both are read in the order of memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 100, 4096, 65536, 69_999])
def test_non_finite_elements(place: int, dtype: torch.dtype, isa: str):
    g = _random((70_000,), dtype, 2)
    g[place] = float("nan")
    g[69_000], g[69_001] = float("inf"), float("-inf")
    found = grad_stats_cpp([g, g[:place], torch.full((33,), float("inf"), dtype=dtype)], isa).to_list()
    _assert_correct(found[0], g)
    assert found[0].non_finite == 3
    _assert_correct(found[1], g[:place])
    assert found[2] == GradientStatistics(0.0, 0.0, 0.0, float("inf"), 33.0)


def test_finite_elements_whose_sum_overflows(isa: str):
    g = torch.full((1000,), 3e38)
    (found,) = grad_stats_cpp([g], isa).to_list()
    assert (found.max_abs, found.min_abs, found.non_finite) == (g[0].item(), g[0].item(), 0.0)
    assert found.sum_abs == pytest.approx(3e41, rel=1e-6)


def test_no_gradients_at_all(isa: str):
    assert grad_stats_cpp([], isa).to_list() == []


def test_writes_all_of_its_output_and_nothing_else(isa: str):
    from gradprune import _C

    grads = [_random((size,), torch.float32, 3) for size in (1, 129, 0)]
    buffer = torch.full((5 * len(grads) + 16,), 12345.0, dtype=torch.float64)
    buffer[8:-8] = float("nan")
    table = [(grad.data_ptr(), grad.numel(), dtype_code(grad.dtype)) for grad in grads]
    _C.grad_stats(table, buffer[8:].data_ptr(), threads=2, isa=isa)
    assert torch.equal(buffer[8:-8].reshape(-1, 5), grad_stats_cpp(grads, isa).pack())
    assert (buffer[:8] == 12345.0).all()
    assert (buffer[-8:] == 12345.0).all()


@pytest.mark.usefixtures("restore_threads")
def test_same_bits_over_repeats_and_threads(isa: str):
    grads = [_random((size,), dtype, 4) for size in (1, 70_000, 300_001) for dtype in DTYPES]
    torch.set_num_threads(1)
    first = grad_stats_cpp(grads, isa).pack()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(grad_stats_cpp(grads, isa).pack(), first) for _ in range(20))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 9000), exponent=st.integers(-8, 8), seed=st.integers(0, 999))
def test_a_power_of_two_scales_exactly(isa: str, size: int, exponent: int, seed: int):
    g, s = _random((size,), torch.float32, seed), 2.0**exponent
    scale = torch.tensor([s, s * s, s, s, 1.0], dtype=torch.float64)
    assert torch.equal(grad_stats_cpp([g * s], isa).pack(), grad_stats_cpp([g], isa).pack() * scale)


def test_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match=r"grads\[1\]: dtype torch.int32"):
        grad_stats_cpp([torch.ones(2), torch.ones(2, dtype=torch.int32)])
    with pytest.raises(ValueError, match=r"grads\[0\]: is torch.strided on meta"):
        grad_stats_cpp([torch.ones(2, device="meta")])
