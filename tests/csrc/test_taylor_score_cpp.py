"""taylor_score in C++ against sums in 80-bit floating point.

Tolerance. Within a tile, at most 120 rows are summed in T (fp32, or fp64 for fp64), or 4096 columns over at least 2
lanes (fp64 in 16 bytes; 4 lanes for fp32) with at most 31 left over; tiles are summed in fp64. So a term passes through
at most L = min(n, 2048 + 31 + 8) roundings of relative size u (2^-24, 2^-53); the product, its square and the result
add 4:

    |computed - exact| <= (L + 4) u sum |term|
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from gradprune.errors import BackendUnavailableError
from gradprune.ops.cpp import taylor_score_cpp
from gradprune.ops.extension import dtype_code, require_extension
from gradprune.ops.vectors import GradientStatistics, ImportanceVectors, Side
from helpers.exact_sums import (
    CANARY,
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

SIZES = [1, 2, 3, 63, 119, 120, 121, 127]
SHAPES = [(o, i) for o in SIZES for i in SIZES] + [
    (3, 1023),
    (2, 1024),
    (5, 1025),
    (257, 2060),
    (1, 4096),
    (3, 4097),
    (5, 9000),
    (2, 140_000),
]


def _assert_scores(vectors: ImportanceVectors, product: np.ndarray, unit: float, extra: float = 0.0) -> None:
    """Compare with the sums of `product`, whose own relative error is `extra`."""
    terms = {"abs": np.abs(product), "square": product * product}
    for axis, kind in ((1, "row"), (0, "column")):
        roundings = min(product.shape[axis], 2087) + 4
        for name, term in terms.items():
            found = exact(getattr(vectors, f"{kind}_{name}"))
            error = np.abs(found - term.sum(axis))
            bound = (roundings * unit + 2 * extra) * term.sum(axis)
            assert found.shape == error.shape == bound.shape
            assert (error <= bound).all(), f"{kind}_{name}: {(error - bound).max()} over its bound"


def _assert_statistics(statistics: GradientStatistics[Tensor], g: Tensor, unit: float) -> None:
    magnitude = np.abs(exact(g)).reshape(-1)
    magnitude = magnitude[np.isfinite(magnitude)]
    roundings = min(g.numel(), 2087 * 2) + 4
    for found, expected in (
        (statistics.sum_abs.item(), magnitude.sum()),
        (statistics.sum_square.item(), (magnitude * magnitude).sum()),
    ):
        assert abs(found - expected) <= roundings * unit * expected
    assert statistics.max_abs.item() == (magnitude.max() if magnitude.size else 0.0)
    assert statistics.min_abs.item() == (magnitude.min() if magnitude.size else np.inf)
    assert statistics.non_finite.item() == g.numel() - magnitude.size


def _unit(w: Tensor, g: Tensor) -> float:
    return 2.0**-53 if w.dtype == g.dtype == torch.float64 else 2.0**-24


def _assert_correct(w: Tensor, g: Tensor, isa: str = "auto") -> None:
    vectors, unit = taylor_score_cpp(w, g, isa=isa), _unit(w, g)
    if (w.dtype == torch.float64) != (g.dtype == torch.float64):
        w, g = w.float(), g.float()
    expected = torch.float64 if unit == 2.0**-53 else torch.float32
    assert {tensor.dtype for tensor in tensors(vectors)} == {expected}
    _assert_scores(vectors, exact(w) * exact(g), unit)
    _assert_statistics(vectors.statistics, g, unit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_exact_sums(shape: tuple[int, int], dtype: torch.dtype, isa: str):
    _assert_correct(random_tensor(shape, dtype, 0), random_tensor(shape, dtype, 1), isa)


@pytest.mark.parametrize("g_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
def test_mixed_dtypes(w_dtype: torch.dtype, g_dtype: torch.dtype, isa: str):
    _assert_correct(random_tensor((130, 1100), w_dtype, 2), random_tensor((130, 1100), g_dtype, 3), isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 0), (0, 65), (65, 0)], ids=str)
def test_empty(shape: tuple[int, int], dtype: torch.dtype, isa: str):
    vectors = taylor_score_cpp(random_tensor(shape, dtype, 0), random_tensor(shape, dtype, 1), isa=isa)
    assert [len(getattr(vectors, name)) for name in SUMS] == [shape[0]] * 2 + [shape[1]] * 2
    assert not any(getattr(vectors, name).any() for name in SUMS)
    assert vectors.statistics.to_float() == GradientStatistics(0.0, 0.0, 0.0, float("inf"), 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype, isa: str):
    w, g = random_tensor((200, 300), dtype, 4), random_tensor((300, 200), dtype, 5)
    whole = taylor_score_cpp(w, g.T.contiguous(), isa=isa)
    assert equal_bits(taylor_score_cpp(w, g.T, isa=isa), whole)  # a transposed gradient
    rows = taylor_score_cpp(w[::2, 3:131], g.T[::2, 3:131], isa=isa)  # a row stride, and unaligned rows
    assert equal_bits(rows, taylor_score_cpp(w[::2, 3:131].clone(), g.T[::2, 3:131].clone(), isa=isa))
    _assert_correct(w[::2, 3:131], g.T[::2, 3:131], isa)
    _assert_correct(w[:, ::3], g.T[:, ::3], isa)  # elements of a row that are not adjacent
    _assert_correct(w[:1].expand(70, 300), g.T[:70], isa)  # a row stride of zero


def test_every_half_precision_value(isa: str):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        g = bits.view(dtype).reshape(-1, 512)
        w = torch.ones(g.shape)
        for unpaired in (g, g[:, :7]):  # whole vectors, and single elements
            absolute = torch.stack(
                [taylor_score_cpp(w[:1, : unpaired.shape[1]], row[None], isa=isa).column_abs for row in unpaired]
            )
            assert torch.equal(absolute.isnan(), unpaired.isnan())
            assert torch.equal(absolute.nan_to_num(0.5), unpaired.float().abs().nan_to_num(0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (5, 63), (119, 1040), (129, 1041)], ids=str)
def test_non_finite_gradient(place: tuple[int, int], value: float, dtype: torch.dtype, isa: str):
    w, g = random_tensor((130, 1042), dtype, 6), random_tensor((130, 1042), dtype, 7)
    clean = taylor_score_cpp(w, g, isa=isa)
    row, column = place
    g[place] = value
    vectors = taylor_score_cpp(w, g, isa=isa)
    for kind, bad in (("row", row), ("column", column)):
        for score in ("abs", "square"):
            before, after = getattr(clean, f"{kind}_{score}"), getattr(vectors, f"{kind}_{score}")
            expected = torch.ones(len(after), dtype=torch.bool)
            expected[bad] = False
            assert torch.equal(after.isfinite(), expected)
            assert torch.equal(after[expected], before[expected])
    _assert_statistics(vectors.statistics, g, _unit(w, g))


def test_non_finite_weight_leaves_statistics(isa: str):
    w, g = random_tensor((9, 100), torch.float32, 8), random_tensor((9, 100), torch.float32, 9)
    clean = taylor_score_cpp(w, g, isa=isa).statistics
    w[4, 50] = float("nan")
    vectors = taylor_score_cpp(w, g, isa=isa)
    assert vectors.statistics == clean
    assert vectors.row_abs.isnan().nonzero().tolist() == [[4]]
    assert vectors.column_square.isnan().nonzero().tolist() == [[50]]


def test_all_non_finite_and_overflowing_sums(isa: str):
    w = torch.ones(3, 70)
    nothing = taylor_score_cpp(w, torch.full((3, 70), float("nan")), isa=isa).statistics
    assert nothing.to_float() == GradientStatistics(0.0, 0.0, 0.0, float("inf"), 210.0)
    # The sum of |g| overflows although every g is finite: no element may be counted as non-finite.
    large = taylor_score_cpp(w, torch.full((3, 70), 3e38), isa=isa).statistics
    largest = torch.tensor(3e38).item()
    assert large.to_float() == GradientStatistics(float("inf"), float("inf"), largest, largest, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (129, 127), (131, 1030)], ids=str)
def test_writes_all_of_its_outputs_and_nothing_else(shape: tuple[int, int], dtype: torch.dtype, isa: str):
    from gradprune import _C

    w, g = random_tensor(shape, dtype, 10), random_tensor(shape, dtype, 11)
    outputs = GuardedOutputs(*shape, torch.float64 if dtype == torch.float64 else torch.float32)
    code = dtype_code(dtype)
    w_argument, g_argument = (w.data_ptr(), w.stride(0), code), (g.data_ptr(), g.stride(0), code)
    _C.taylor_score(w_argument, g_argument, *shape, "both", outputs.addresses, threads=2, isa=isa)
    outputs.assert_written(taylor_score_cpp(w, g, isa=isa))


@pytest.mark.parametrize("missing", ["w", "g"])
def test_a_null_address_is_refused_by_its_own_name(missing: str):
    from gradprune import _C

    w, g = random_tensor((2, 3), torch.float32, 12), random_tensor((2, 3), torch.float32, 13)
    outputs = GuardedOutputs(2, 3, torch.float32)
    arguments = [(0 if name == missing else t.data_ptr(), 3, dtype_code(t.dtype)) for name, t in (("w", w), ("g", g))]
    with pytest.raises(ValueError, match=f"^{missing}: null address$"):
        _C.taylor_score(*arguments, 2, 3, "both", outputs.addresses, threads=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_one_side_has_the_same_bits_as_both(side: Side, dtype: torch.dtype, isa: str):
    w, g = random_tensor((131, 4130), dtype, 14), random_tensor((131, 4130), dtype, 15)
    g[3, 5] = float("nan")
    both = taylor_score_cpp(w, g, isa=isa)
    assert equal_bits(taylor_score_cpp(w, g, side, isa), one_side(both, side))


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_the_other_side_is_not_touched(side: Side, isa: str):
    from gradprune import _C

    w, g = random_tensor((131, 300), torch.float32, 16), random_tensor((131, 300), torch.float32, 17)
    outputs = GuardedOutputs(131, 300, torch.float32)
    arguments = [(t.data_ptr(), t.stride(0), dtype_code(t.dtype)) for t in (w, g)]
    _C.taylor_score(*arguments, 131, 300, side, outputs.addresses, threads=1, isa=isa)
    other = {"rows": slice(2, 4), "columns": slice(0, 2)}[side]
    for buffer in outputs.buffers[other]:
        assert buffer[16:-16].isnan().all()
        assert (buffer[:16] == CANARY).all()
        assert (buffer[-16:] == CANARY).all()


def test_the_statistics_are_in_the_order_of_their_names():
    from gradprune import _C

    assert [field.name for field in fields(GradientStatistics)] == _C.STATISTICS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("restore_threads")
def test_same_bits_over_repeats_and_threads(dtype: torch.dtype, isa: str):
    w, g = random_tensor((700, 1500), dtype, 12), random_tensor((700, 1500), dtype, 13)
    torch.set_num_threads(1)
    first = taylor_score_cpp(w, g, isa=isa)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(equal_bits(taylor_score_cpp(w, g, isa=isa), first) for _ in range(20))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 300), columns=st.integers(1, 200), exponent=st.integers(-8, 8), seed=st.integers(0, 999))
def test_invariants(isa: str, rows: int, columns: int, exponent: int, seed: int):
    w, g = (
        random_tensor((rows, columns), torch.float32, seed),
        random_tensor((rows, columns), torch.float32, seed + 1000),
    )
    vectors = taylor_score_cpp(w, g, isa=isa)
    # A power of two scales exactly: s |w g|, s^2 (w g)^2.
    scaled, s = taylor_score_cpp(w, g * 2.0**exponent, isa=isa), 2.0**exponent
    for name in SUMS:
        assert torch.equal(getattr(scaled, name), getattr(vectors, name) * (s * s if "square" in name else s))
    assert torch.equal(scaled.statistics.pack(), vectors.statistics.pack() * torch.tensor([s, s * s, s, s, 1.0]))
    # Permuted rows permute the row sums, to the bit.
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    permuted = taylor_score_cpp(w[order], g[order], isa=isa)
    for name in ROW_SUMS:
        assert torch.equal(getattr(permuted, name), getattr(vectors, name)[order])
    for name in ("max_abs", "min_abs", "non_finite"):
        assert getattr(permuted.statistics, name) == getattr(vectors.statistics, name)


def test_refuses_what_it_cannot_do():
    w = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"g: has shape \(4, 3\)"):
        taylor_score_cpp(w, w.T)
    with pytest.raises(ValueError, match=r"w: has shape \(12,\)"):
        taylor_score_cpp(w.reshape(-1), w)
    with pytest.raises(ValueError, match=r"g: dtype torch.int64"):
        taylor_score_cpp(w, w.long())
    with pytest.raises(ValueError, match=r"w: is torch.strided on meta"):
        taylor_score_cpp(w.to("meta"), w)
    with pytest.raises(ValueError, match=r"side: 'left' is none of rows, columns, both"):
        taylor_score_cpp(w, w, "left")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"isa: 'sse' is none of auto"):
        taylor_score_cpp(w, w, isa="sse")


def test_missing_extension_and_instruction_set(monkeypatch: pytest.MonkeyPatch):
    from gradprune import _C

    monkeypatch.setattr(_C, "build_info", lambda: {"isas": ["scalar"]})
    require_extension.cache_clear()
    with pytest.raises(BackendUnavailableError, match="isa: 'avx512' cannot run on this CPU; it has scalar"):
        taylor_score_cpp(torch.ones(1, 1), torch.ones(1, 1), isa="avx512")
    monkeypatch.setitem(__import__("sys").modules, "gradprune._C", None)
    monkeypatch.delattr("gradprune._C")
    require_extension.cache_clear()
    with pytest.raises(BackendUnavailableError, match="backend: 'cpp' cannot run"):
        taylor_score_cpp(torch.ones(1, 1), torch.ones(1, 1))


def test_calls_from_several_threads_do_not_interfere():
    pairs = [(random_tensor((700, 900), torch.float32, 2 * k), random_tensor((700, 900), torch.float32, 2 * k + 1))
             for k in range(8)]  # fmt: skip
    alone = [taylor_score_cpp(w, g) for w, g in pairs]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            together = threads.map(lambda pair: taylor_score_cpp(*pair), pairs)
            assert all(map(equal_bits, alone, together))
