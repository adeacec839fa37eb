import logging
import sys

import pytest
import torch

from gradprune.errors import BackendUnavailableError
from gradprune.ops.dispatch import linear_importance, select_ops, taylor_score, unavailable_reason

W, G = (torch.randn(7, 9, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


@pytest.fixture(autouse=True)
def _fresh_choice():
    select_ops.cache_clear()
    yield
    select_ops.cache_clear()


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton", "auto"])
def test_every_backend_computes_the_same(backend: str) -> None:
    if unavailable_reason(backend, "cpu") and backend == "triton":
        pytest.skip(f"triton is NOT tested here: {unavailable_reason(backend, 'cpu')}")
    product = (W * G).double()
    found = taylor_score(W, G, backend)
    torch.testing.assert_close(found.row_abs.double(), product.abs().sum(1), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found.column_square.double(), product.square().sum(0), rtol=1e-6, atol=0.0)
    x, dy = torch.randn(2, 5, 9), torch.randn(2, 5, 7)
    gradients = dy.double().transpose(1, 2) @ x.double()
    expected = (W.double() * gradients).abs().sum((0, 2))
    found = linear_importance(x, dy, W, backend)
    torch.testing.assert_close(found.row_abs.double(), expected, rtol=1e-5, atol=0.0)


def test_auto_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "gradprune._C", None)
    with caplog.at_level(logging.INFO, "gradprune"):
        assert select_ops("auto", "cpu").backend == "reference"
        select_ops("auto", "cpu")
    assert len(caplog.records) == 1
    assert "'cpp' cannot run: the extension gradprune._C does not import" in caplog.text


def test_a_backend_asked_for_by_name_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_ops("cpp", "cpu").backend == "cpp"
    monkeypatch.setitem(sys.modules, "gradprune._C", None)
    select_ops.cache_clear()
    with pytest.raises(BackendUnavailableError, match="'cpp' cannot run on cpu: the extension"):
        select_ops("cpp", "cpu")
    with pytest.raises(BackendUnavailableError, match="'cpp' cannot run on cuda"):
        select_ops("cpp", "cuda")
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot run on cpu"):
        taylor_score(W, G, "cuda")
