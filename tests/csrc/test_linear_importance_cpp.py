"""linear_importance in C++ against gradients and sums in 80-bit floating point.

Tolerance. A gradient is a sum over T tokens, each with one rounding of relative size u (2^-24, 2^-53 for fp64):
|fl(g) - g| <= T u sum_t |dy x|. A sum within a tile of at most 256 columns or 120 rows and the result are rounded, too;
sums over tiles and samples are in fp64. With P = |w| |dy|^T |x| in place of |w g|:

    |computed - exact| <= (T + L + 4) u sum P, twice that for squares,   L = min(n, 256)
"""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from gradprune.ops.cpp import linear_importance_cpp
from gradprune.ops.extension import dtype_code
from gradprune.ops.vectors import GradientStatistics, ImportanceVectors, Side
from helpers.exact_sums import (
    COLUMN_SUMS,
    DTYPES,
    ROW_SUMS,
    SUMS,
    GuardedOutputs,
    equal_bits,
    exact,
    one_side,
    random_tensor,
    tensors,
)

pytest.importorskip("gradprune._C", reason="the extension is not built")

# N, T, O, I. Panels have 6 or 12 rows and 2 vectors of columns, tiles are 120 x 256, and 256 tokens are read at a time.
SIZES = [
    (1, 1, 1, 1),
    (2, 5, 6, 16),
    (2, 7, 7, 17),
    (1, 3, 12, 32),
    (3, 4, 13, 31),
    (3, 17, 65, 130),
    (1, 2, 120, 256),
    (2, 2, 121, 257),
    (1, 2, 250, 530),
    (1, 255, 5, 9),
    (1, 256, 6, 8),
    (2, 257, 11, 19),
    (1, 515, 13, 33),
]


def _operands(sizes: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    n, t, o, i = sizes
    shapes = ((n, t, i), (n, t, o), (o, i))
    x, dy, w = (random_tensor(shape, dtype, seed + k) for k, shape in enumerate(shapes))
    return x, dy, w


def _assert_correct(x: Tensor, dy: Tensor, w: Tensor, found: ImportanceVectors) -> None:
    unit = 2.0**-53 if x.dtype == dy.dtype == w.dtype == torch.float64 else 2.0**-24
    weight, tokens = exact(w), x.shape[1]
    gradients = [exact(dy[n]).T @ exact(x[n]) for n in range(len(x))]
    sizes = [np.abs(exact(dy[n])).T @ np.abs(exact(x[n])) for n in range(len(x))]
    for axis, kind in ((1, "row"), (0, "column")):
        bound = (tokens + min(w.shape[axis], 256) + 4) * unit
        for name, score in {"abs": np.abs, "square": np.square}.items():
            expected = sum(score(weight * g).sum(axis) for g in gradients)
            size = sum(((np.abs(weight) * s) ** (2 if name == "square" else 1)).sum(axis) for s in sizes)
            error = np.abs(exact(getattr(found, f"{kind}_{name}")) - expected)
            assert (error <= (2 if name == "square" else 1) * bound * size).all(), f"{kind}_{name}: {error.max()}"
    _assert_statistics(found.statistics, np.abs(np.stack(gradients)), np.stack(sizes), tokens, unit)


def _assert_statistics(
    statistics: GradientStatistics[Tensor], g: np.ndarray, size: np.ndarray, tokens: int, unit: float
) -> None:
    """`g`: magnitudes of the gradients; `size`: what their rounding errors are relative to; both [N, O, I]."""
    of_sum = (tokens + 120 * 256 // 4 + 4) * unit
    found = statistics.to_float()
    assert abs(found.sum_abs - g.sum()) <= of_sum * size.sum()
    assert abs(found.sum_square - (g * g).sum()) <= 2 * of_sum * (size * size).sum()
    assert abs(found.max_abs - g.max()) <= (tokens + 1) * unit * size.max()
    assert abs(found.min_abs - g.min()) <= (tokens + 1) * unit * size.max()
    assert found.non_finite == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_exact_sums(sizes: tuple[int, int, int, int], dtype: torch.dtype, isa: str):
    x, dy, w = _operands(sizes, dtype)
    found = linear_importance_cpp(x, dy, w, isa=isa)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {tensor.dtype for tensor in tensors(found)} == {expected}
    _assert_correct(x, dy, w, found)


@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dy_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_mixed_dtypes(x_dtype: torch.dtype, dy_dtype: torch.dtype, w_dtype: torch.dtype, isa: str):
    x, dy, w = _operands((2, 9, 14, 40), torch.float64)
    x, dy, w = x.to(x_dtype), dy.to(dy_dtype), w.to(w_dtype)
    if len({x_dtype, dy_dtype, w_dtype}) > 1:  # fp64 operands among others are rounded to fp32 first
        x, dy, w = x.float(), dy.float(), w.float()
    _assert_correct(x, dy, w, linear_importance_cpp(x.to(x_dtype), dy.to(dy_dtype), w.to(w_dtype), isa=isa))


@pytest.mark.parametrize("sizes", [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)], ids=str)
def test_empty(sizes: tuple[int, int, int, int], isa: str):
    found = linear_importance_cpp(*_operands(sizes, torch.float32), isa=isa)
    assert [len(getattr(found, name)) for name in SUMS] == [sizes[2]] * 2 + [sizes[3]] * 2
    assert not any(getattr(found, name).any() for name in SUMS)
    # Without tokens a gradient is zero everywhere; without elements there is no smallest magnitude.
    smallest = 0.0 if sizes[1] == 0 else float("inf")
    assert found.statistics.to_float() == GradientStatistics(0.0, 0.0, 0.0, smallest, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype, isa: str):
    x, dy, w = _operands((4, 20, 30, 50), dtype)
    views = {
        "a slice of a wider tensor": (x[..., 3:43], dy[..., 5:18], w[2:15, 7:47]),
        "every other sample and token": (x[::2, ::3], dy[::2, ::3], w),
        "batch and tokens exchanged": (x.transpose(0, 1), dy.transpose(0, 1), w),
        "elements apart": (x[..., ::2], dy[..., ::3], w[::3, ::2]),
        "one sample again and again": (x[:1].expand(4, 20, 50), dy[:1].expand(4, 20, 30), w[:1].expand(30, 50)),
    }
    for name, (some_x, some_dy, some_w) in views.items():
        whole = linear_importance_cpp(some_x.contiguous(), some_dy.contiguous(), some_w.contiguous(), isa=isa)
        assert equal_bits(linear_importance_cpp(some_x, some_dy, some_w, isa=isa), whole), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite(value: float, dtype: torch.dtype, isa: str):
    x, dy, w = _operands((3, 6, 125, 262), dtype)
    dy[1, 4, 124] = value  # one row of one sample's gradient
    found = linear_importance_cpp(x, dy, w, isa=isa)
    assert found.statistics.non_finite == 262
    finite = torch.ones(125, dtype=torch.bool)
    finite[124] = False
    for name in ROW_SUMS:
        assert torch.equal(getattr(found, name).isfinite(), finite)
    for name in COLUMN_SUMS:
        assert not getattr(found, name).isfinite().any()
    dy[1, 4, 124], x[2, 0, 261] = 1.0, value  # one column
    found = linear_importance_cpp(x, dy, w, isa=isa)
    assert found.statistics.non_finite == 125
    assert found.column_abs.isfinite().sum() == 261
    assert found.statistics.pack().isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_all_of_its_outputs_and_nothing_else(dtype: torch.dtype, isa: str):
    from gradprune import _C

    x, dy, w = _operands((2, 5, 121, 259), dtype)
    outputs = GuardedOutputs(121, 259, torch.float64 if dtype == torch.float64 else torch.float32)
    code = dtype_code(dtype)
    activations = [(t.data_ptr(), t.stride(0), t.stride(1), code) for t in (x, dy)]
    weight = (w.data_ptr(), w.stride(0), code)
    _C.linear_importance(*activations, weight, (2, 5, 121, 259), "both", outputs.addresses, threads=2, isa=isa)
    outputs.assert_written(linear_importance_cpp(x, dy, w, isa=isa))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_one_side_has_the_same_bits_as_both(side: Side, dtype: torch.dtype, isa: str):
    x, dy, w = _operands((3, 20, 125, 262), dtype)
    both = linear_importance_cpp(x, dy, w, isa=isa)
    assert equal_bits(linear_importance_cpp(x, dy, w, side, isa), one_side(both, side))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("restore_threads")
def test_same_bits_over_repeats_and_threads(dtype: torch.dtype, isa: str):
    x, dy, w = _operands((3, 70, 250, 600), dtype)
    torch.set_num_threads(1)
    first = linear_importance_cpp(x, dy, w, isa=isa)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(equal_bits(linear_importance_cpp(x, dy, w, isa=isa), first) for _ in range(5))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(0, 300), st.integers(1, 130), st.integers(1, 270)),
    exponent=st.integers(-8, 8),
    seed=st.integers(0, 999),
)
def test_invariants(isa: str, sizes: tuple[int, int, int, int], exponent: int, seed: int):
    x, dy, w = _operands(sizes, torch.float32, seed)
    vectors = linear_importance_cpp(x, dy, w, isa=isa)
    # A power of two scales exactly: s |w g|, s^2 (w g)^2.
    s = 2.0**exponent
    scaled = linear_importance_cpp(x, dy * s, w, isa=isa)
    for name in SUMS:
        assert torch.equal(getattr(scaled, name), getattr(vectors, name) * (s * s if "square" in name else s))
    assert torch.equal(scaled.statistics.pack(), vectors.statistics.pack() * torch.tensor([s, s * s, s, s, 1.0]))
    # A sample of zeros changes no bit.
    more = torch.cat([x, torch.zeros_like(x[:1])]), torch.cat([dy, torch.zeros_like(dy[:1])])
    for name in SUMS:
        assert torch.equal(getattr(linear_importance_cpp(*more, w, isa=isa), name), getattr(vectors, name))


def test_refuses_what_it_cannot_do():
    w = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"dy: has shape \(2, 5, 4\); \(2, 5, 3\) is needed"):
        linear_importance_cpp(torch.randn(2, 5, 4), torch.randn(2, 5, 4), w)
    with pytest.raises(ValueError, match=r"x: has shape \(2, 5, 3\)"):
        linear_importance_cpp(torch.randn(2, 5, 3), torch.randn(2, 5, 3), w)
    with pytest.raises(ValueError, match=r"w: has shape \(12,\)"):
        linear_importance_cpp(torch.randn(2, 5, 4), torch.randn(2, 5, 3), w.reshape(-1))
    with pytest.raises(ValueError, match=r"x: dtype torch.int64"):
        linear_importance_cpp(torch.zeros(2, 5, 4, dtype=torch.int64), torch.randn(2, 5, 3), w)
