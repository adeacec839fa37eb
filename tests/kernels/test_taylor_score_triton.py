import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels are NOT tested here")

from gradprune.kernels import taylor_score as kernel
from gradprune.kernels.taylor_score import TaylorScoreConfig
from gradprune.ops.reference import taylor_score_reference
from gradprune.ops.triton import taylor_score_triton
from gradprune.ops.vectors import GradientStatistics
from helpers.devices import DEVICE, TRITON_TESTS

pytestmark = TRITON_TESTS
SMALL = TaylorScoreConfig(ROWS=16, BLOCK_O=4, BLOCK_I=32)
# In rows and in columns: 1, a strip, one less and one more than a strip, and several strips of rows.
ROWS, COLUMNS = [1, 15, 16, 17, 63], [1, 31, 32, 33]


def matrices(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w, g = (torch.randn(rows, columns, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    return w, g


def assert_equals_fp64(found, w: torch.Tensor, g: torch.Tensor) -> None:
    """A sum of n fp32 terms errs by at most n * 2^-24 of the sum of their magnitudes, and each term by 2 roundings."""
    (rows, statistics), (columns, of_columns) = ([part.double().cpu() for part in side] for side in found)
    assert torch.equal(statistics, of_columns)
    w, g = w.double().cpu(), g.double().cpu()
    bound = (max(*w.shape, 1) + 2) * 2.0**-24
    product = w * g
    for dim, sums in ((1, rows), (0, columns)):
        for row, terms in zip(sums, (product.abs(), product**2), strict=True):
            error = (row - terms.sum(dim)).abs()
            assert (error <= bound * terms.sum(dim)).all(), (dim, error.max())
    expected = taylor_score_reference(w, g).statistics.pack()
    torch.testing.assert_close(statistics, expected, rtol=w.numel() * 2.0**-24, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
def test_equals_fp64_on_awkward_shapes(rows: int, dtype: torch.dtype) -> None:
    for columns in COLUMNS:
        w, g = matrices(rows, columns, dtype)
        assert_equals_fp64(kernel.taylor_score_triton(w, g, config=SMALL), w, g)


def test_every_partial_sum_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any part of the scratch that the kernel does not write would be NaN."""
    real = torch.empty

    def poisoned(*args, **options):
        return real(*args, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)
    w, g = matrices(37, 71, torch.float32)
    found = kernel.taylor_score_triton(w, g, config=SMALL)
    assert all(part.isfinite().all() for side in found for part in side)


@pytest.mark.parametrize("view", [lambda t: t[:, 3:40], lambda t: t[::2], lambda t: t.T, lambda t: t[5:, 1:]])
def test_strided_and_transposed_inputs(view) -> None:
    w, g = (view(part) for part in matrices(41, 43, torch.float32))
    found = taylor_score_triton(w, g)
    statistics = found.statistics.pack()
    assert_equals_fp64([(torch.stack([*found.sums(side)]), statistics) for side in ("rows", "columns")], w, g)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    found = taylor_score_triton(torch.zeros(shape, device=DEVICE), torch.zeros(shape, device=DEVICE))
    assert found.row_abs.shape == shape[:1]
    assert found.column_abs.shape == shape[1:]
    assert found.statistics.to_float() == GradientStatistics(0.0, 0.0, 0.0, float("inf"), 0.0)


def test_non_finite_gradients_are_counted_and_make_their_sums_non_finite() -> None:
    w, g = matrices(20, 40, torch.float32)
    g[3, 7], g[18, 39], g[0, 0] = float("nan"), float("inf"), -float("inf")
    (rows, statistics), (columns, _) = kernel.taylor_score_triton(w, g, config=SMALL)
    expected = taylor_score_reference(w.double(), g.double())
    assert statistics[4] == 3
    torch.testing.assert_close(statistics.double(), expected.statistics.pack(), rtol=1e-5, atol=0.0)
    assert (~rows[0].isfinite()).nonzero().flatten().tolist() == [0, 3, 18]
    assert (~columns[0].isfinite()).nonzero().flatten().tolist() == [0, 7, 39]


def test_the_same_bits_every_time() -> None:
    w, g = matrices(33, 65, torch.bfloat16)
    first = kernel.taylor_score_triton(w, g, config=SMALL)
    for _ in range(3):
        for one, two in zip(first, kernel.taylor_score_triton(w, g, config=SMALL), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_wrong_arguments_are_named() -> None:
    w, g = matrices(4, 5, torch.float32)
    with pytest.raises(ValueError, match=r"g: has shape \(5, 4\)"):
        taylor_score_triton(w, g.T)
    with pytest.raises(ValueError, match=r"w: dtype torch.float64"):
        taylor_score_triton(w.double(), g)
