"""scale_gradients in C++ has the same bits as an independent rounding of the exact product."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from gradprune.ops.cpp import scale_gradients_cpp
from gradprune.ops.extension import dtype_code

pytest.importorskip("gradprune._C", reason="the extension is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SCALES = [0.3, -1.7, 0.0, 2.0**-12, 1e-4, 3e4, 1.0]


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _expected(g: Tensor, scale: float) -> Tensor:
    """Return the product, exact in fp64, rounded to fp32 and then to the element type, by hand for bf16."""
    with np.errstate(over="ignore", invalid="ignore"):
        if g.dtype == torch.float64:
            return torch.from_numpy(g.numpy() * scale)
        exact = g.double().numpy() * float(np.float32(scale))
        single = exact.astype(np.float32)
        if g.dtype == torch.float32:
            return torch.from_numpy(single)
        if g.dtype == torch.float16:
            return torch.from_numpy(single.astype(np.float16))
    bits = single.view(np.uint32).astype(np.uint64)
    low, kept = bits & 0xFFFF, bits >> 16
    kept = kept + ((low > 0x8000) | ((low == 0x8000) & (kept & 1 == 1)))
    rounded = (kept.astype(np.uint32) << 16).view(np.float32)
    return torch.from_numpy(np.where(np.isnan(single), np.float32(np.nan), rounded)).to(torch.bfloat16)


def _assert_same(found: Tensor, expected: Tensor) -> None:
    """Check that values and signs are equal, the signs of zeros included, and that NaN is at the same places."""
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.5), expected.nan_to_num(0.5))
    assert torch.equal(found.signbit()[~found.isnan()], expected.signbit()[~found.isnan()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_matches_a_rounded_exact_product(scale: float, dtype: torch.dtype, isa: str):
    grads = [_random((size,), dtype, size) for size in (0, 1, 63, 127, 128, 129, 70_001)]
    before = [grad.clone() for grad in grads]
    scale_gradients_cpp(grads, [scale] * len(grads), isa)
    for grad, old in zip(grads, before, strict=True):
        _assert_same(grad, _expected(old, scale))
        _assert_same(grad, old * scale)  # and equals PyTorch's product


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.3, 0.5, 2.0**-9, 1.25, 700.0, -0.0])
def test_every_half_precision_value(scale: float, dtype: torch.dtype, isa: str):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype)
    whole, single = every.clone(), list(every[:4095].clone().split(1))  # whole vectors, and single elements
    scale_gradients_cpp([whole, *single], [scale] * (1 + len(single)), isa)
    _assert_same(whole, _expected(every, scale))
    _assert_same(torch.cat(single), _expected(every[:4095], scale))


def test_each_gradient_has_its_own_scale(isa: str):
    grads = [torch.ones(100, dtype=dtype) for dtype in DTYPES for _ in range(2)]
    scales = [2.0**k for k in range(len(grads))]
    scale_gradients_cpp(grads, scales, isa)
    assert [set(grad.tolist()) for grad in grads] == [{scale} for scale in scales]


def test_strides(isa: str):
    base = _random((60, 90), torch.float32, 1)
    for view in (lambda t: t.T, lambda t: t[::2, 1::3], lambda t: t[3]):
        found, expected = base.clone(), base.clone()
        scale_gradients_cpp([view(found)], [0.3], isa)
        view(expected).mul_(0.3)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_nothing_beside_its_gradient(dtype: torch.dtype, isa: str):
    from gradprune import _C

    for size in (1, 63, 129):
        buffer = torch.full((size + 32,), 7.0, dtype=dtype)
        _C.scale_gradients([(buffer[16:].data_ptr(), size, dtype_code(dtype))], [2.0], threads=2, isa=isa)
        assert buffer.tolist() == [7.0] * 16 + [14.0] * size + [7.0] * 16


def test_autograd_sees_the_change():
    parameter = torch.ones(4, requires_grad=True)
    squared = parameter.square().sum()
    scale_gradients_cpp([parameter], [2.0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


@pytest.mark.usefixtures("restore_threads")
def test_same_bits_over_threads(isa: str):
    grads = [_random((200_001,), dtype, 4) for dtype in DTYPES]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        copies = [grad.clone() for grad in grads]
        scale_gradients_cpp(copies, [0.3] * len(copies), isa)
        results.append(copies)
    for copies in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(copies, results[0], strict=True))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 5000), exponent=st.integers(-8, 8), seed=st.integers(0, 999))
def test_a_power_of_two_and_its_inverse_change_nothing(isa: str, size: int, exponent: int, seed: int):
    g = _random((size,), torch.float32, seed)
    found = g.clone()
    scale_gradients_cpp([found], [2.0**exponent], isa)
    scale_gradients_cpp([found], [2.0**-exponent], isa)
    assert torch.equal(found, g)


def test_refuses_what_it_cannot_scale():
    with pytest.raises(ValueError, match="scales: has 1 entries for 2 gradients"):
        scale_gradients_cpp([torch.ones(1), torch.ones(1)], [1.0])
    with pytest.raises(ValueError, match=r"grads\[0\]: is expanded"):
        scale_gradients_cpp([torch.ones(1).expand(3)], [2.0])
    with pytest.raises(ValueError, match=r"grads\[0\]: dtype torch.int64"):
        scale_gradients_cpp([torch.ones(1, dtype=torch.int64)], [2.0])
