"""See `test_ahead_of_time.py`: here Triton is the version that torch 2.11 installs on a GPU machine.

The tests are in a file of their own, so that they can run at the same time as those.
"""

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels are NOT compiled here")

from helpers.kernel_gates import GATES, Compiled, all_compiled, refused


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    return all_compiled("3.6.0")


@pytest.mark.parametrize("gate", GATES)
def test_every_kernel_is_within_its_budgets(gate: str, compiled: list[Compiled]) -> None:
    assert list(refused(gate, compiled)) == []
