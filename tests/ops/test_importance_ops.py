import logging
import sys

import pytest
import torch

from gradprune.errors import BackendUnavailableError
from gradprune.ops.dispatch import linear_importance, mask_gradient, select_ops, taylor_score
from gradprune.ops.vectors import Side
from helpers.devices import require_backend
from helpers.exact_sums import COLUMN_SUMS, ROW_SUMS, SUMS

W, G = (torch.randn(7, 9, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
X, DY = (torch.randn(2, 5, width, generator=torch.Generator().manual_seed(width)) for width in (9, 7))


@pytest.fixture(autouse=True)
def _fresh_choice():
    select_ops.cache_clear()
    yield
    select_ops.cache_clear()


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton", "auto"])
def test_every_backend_computes_the_same(backend: str, device: str) -> None:
    require_backend(backend, device)
    w, g, x, dy = (tensor.to(device) for tensor in (W, G, X, DY))
    product = (w * g).double()
    found = taylor_score(w, g, backend=backend)
    torch.testing.assert_close(found.row_abs.double(), product.abs().sum(1), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found.column_square.double(), product.square().sum(0), rtol=1e-6, atol=0.0)
    gradients = dy.double().transpose(1, 2) @ x.double()
    expected = (w.double() * gradients).abs().sum((0, 2))
    found = linear_importance(x, dy, w, backend=backend)
    torch.testing.assert_close(found.row_abs.double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("side", ["rows", "columns", "both"])
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_only_the_side_asked_for_is_returned(backend: str, side: Side, device: str) -> None:
    require_backend(backend, device)
    w, g, x, dy = (tensor.to(device) for tensor in (W, G, X, DY))
    for op, arguments in ((taylor_score, (w, g)), (linear_importance, (x, dy, w))):
        both, found = op(*arguments, backend=backend), op(*arguments, side, backend)
        for name in SUMS:
            if side == "both" or name in {"rows": ROW_SUMS, "columns": COLUMN_SUMS}[side]:
                torch.testing.assert_close(getattr(found, name), getattr(both, name), rtol=1e-6, atol=0.0)
            else:
                assert getattr(found, name) is None
        # Triton computes a different product for each side, so that the smallest element differs by roundings.
        off = 1e-6 * both.statistics.max_abs.item() if backend == "triton" else 0.0
        torch.testing.assert_close(found.statistics.pack(), both.statistics.pack(), rtol=1e-6, atol=off)
        for one in ("rows", "columns"):
            if side in (one, "both"):
                for sums, name in zip(found.sums(one), ("abs", "square"), strict=True):
                    assert torch.equal(sums, getattr(found, f"{one[:-1]}_{name}"))
            else:
                with pytest.raises(ValueError, match=f"side: the {one} were not computed"):
                    found.sums(one)
        with pytest.raises(ValueError, match="side: 'left' is none of rows, columns, both"):
            op(*arguments, "left", backend)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_a_mask_gradient_equals_the_column_sums_of_weight_times_gradient(backend: str, device: str) -> None:
    require_backend(backend, device)
    w, x, dy = (tensor.to(device) for tensor in (W, X, DY))
    found = mask_gradient(x, dy @ w, backend)
    of_weight = (w * (dy.transpose(1, 2) @ x)).sum(1)
    torch.testing.assert_close(found.gradient, of_weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.input_square, x.square().sum(1), rtol=1e-6, atol=0.0)


def test_auto_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "gradprune._C", None)
    with caplog.at_level(logging.INFO, "gradprune"):
        assert select_ops("auto", "cpu").backend == "reference"
        select_ops("auto", "cpu")
    assert len(caplog.records) == 1
    assert "'cpp' cannot run: the extension gradprune._C does not import" in caplog.text


def test_missing_kernels_are_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The kernels' source is outside the package's source folder; only an installation puts it into the package."""
    pytest.importorskip("triton")
    monkeypatch.setitem(sys.modules, "gradprune.kernels", None)
    with caplog.at_level(logging.INFO, "gradprune"):
        assert select_ops("auto", "cuda").backend == "reference"
    assert "'triton' cannot run: the package gradprune.kernels is missing (install gradprune" in caplog.text
    with pytest.raises(BackendUnavailableError, match=r"'triton' cannot run on cuda: .* gradprune\.kernels is missing"):
        select_ops("triton", "cuda")


def test_a_backend_asked_for_by_name_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_ops("cpp", "cpu").backend == "cpp"
    monkeypatch.setitem(sys.modules, "gradprune._C", None)
    select_ops.cache_clear()
    with pytest.raises(BackendUnavailableError, match="'cpp' cannot run on cpu: the extension"):
        select_ops("cpp", "cpu")
    with pytest.raises(BackendUnavailableError, match="'cpp' cannot run on cuda"):
        select_ops("cpp", "cuda")
    with pytest.raises(
        BackendUnavailableError, match="'cuda' cannot run on cpu: it has no importance ops; choose auto"
    ):
        taylor_score(W, G, backend="cuda")
