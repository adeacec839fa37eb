"""Fixtures for the tests of the C++ ops."""

import pytest

from gradprune.ops.extension import ISAS


@pytest.fixture(params=ISAS[1:])
def isa(request: pytest.FixtureRequest) -> str:
    extension = pytest.importorskip("gradprune._C", reason="the extension is not built")
    available = extension.build_info()["isas"]
    if request.param not in available:
        pytest.skip(f"this CPU has no {request.param}, only {', '.join(available)}: its kernels are NOT tested here")
    return str(request.param)
