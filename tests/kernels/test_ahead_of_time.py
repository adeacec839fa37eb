"""The installed Triton compiles every kernel, for devices that need not be present, within budgets of resources.

A gate that no kernel fails shows nothing, so each gate is also tried on a kernel that was made worse.
"""

import json

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels are NOT compiled here")

from helpers.kernel_gates import GATES, Compiled, all_compiled, compile_kernels, refused


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    return all_compiled("installed")


@pytest.mark.parametrize("gate", GATES)
def test_every_kernel_is_within_its_budgets(gate: str, compiled: list[Compiled]) -> None:
    assert list(refused(gate, compiled)) == []


@pytest.fixture(scope="module")
def worsened() -> dict[str, list[Compiled]]:
    """By the name of a gate, the compiled kernels that it should refuse."""
    found: dict[str, list[Compiled]] = {}
    for line in compile_kernels("installed", "--worsened").splitlines():
        entry = json.loads(line)
        for gate in entry["gates"]:
            found.setdefault(gate, []).append(entry)
    return found


@pytest.mark.parametrize("gate", GATES)
def test_each_gate_refuses_a_kernel_that_was_made_worse(gate: str, worsened: dict[str, list[Compiled]]) -> None:
    entries = worsened[gate]
    assert list(refused(gate, entries)) == entries
