"""What the compiler makes of every Triton kernel, for devices that are not there: a gate on resources.

The budgets are what the kernels take, and a little more. A change that exceeds one makes a kernel slower on a GPU in a
way that no test on a CPU can see.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels are NOT compiled here")

ROOT = Path(__file__).resolve().parents[2]
# Installed side by side, because another version generates other code: the one that torch 2.11 brings to a GPU machine.
OTHER = ROOT / ".venv" / "triton-3.6.0"

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes, the most that a block may have
OF_SM = 228 * 1024  # bytes on Hopper, of which each block takes 1 KiB more than it asks for
REGISTERS_OF_SM = 65536


@pytest.fixture(scope="module", params=["installed", "3.6.0"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if request.param != "installed" and not OTHER.is_dir():
        pytest.skip(
            f"triton 3.6.0 is NOT checked here: it is not at {OTHER} "
            f"(pip install --no-deps --target {OTHER} triton==3.6.0)"
        )
    path = [str(OTHER), str(ROOT)] if request.param != "installed" else [str(ROOT)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    environment.pop("TRITON_INTERPRET", None)
    program = ROOT / "tests" / "helpers" / "compile_kernels.py"
    run = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert request.param == "installed" or {entry["triton"] for entry in found} == {request.param}
    return found


def _named(found: list[dict[str, Any]], *words: str) -> list[dict[str, Any]]:
    chosen = [entry for entry in found if all(word in entry["name"] for word in words)]
    assert chosen, words
    return chosen


def _per_element(entry: dict[str, Any], count: str) -> float:
    return float(entry[count]) / entry["elements"]


def test_no_register_is_spilled(compiled: list[dict[str, Any]]) -> None:
    """But on the error path, which is only to be right."""
    assert [e for e in compiled if e["stack"] and not e["name"].startswith("recount")] == []


def test_every_block_fits_its_device(compiled: list[dict[str, Any]]) -> None:
    assert [e for e in compiled if e["shared"] > SHARED_MEMORY[e["capability"]]] == []


def test_tensor_cores_are_used_at_full_rate(compiled: list[dict[str, Any]]) -> None:
    """wgmma is what Hopper's full rate takes; fp32 is multiplied in fp32 and has none."""
    for entry in _named(compiled, "linear_importance"):
        assert (entry["wgmma"] > 0) == (entry["capability"] == 90 and entry["dtype"] != "fp32"), entry


def test_two_blocks_of_the_default_fit_on_an_sm(compiled: list[dict[str, Any]]) -> None:
    for entry in _named(compiled, "linear_importance", "stages=3", "descriptors"):
        assert 2 * (entry["shared"] + 1024) <= OF_SM, entry
        assert 2 * entry["registers"] * entry["warps"] * 32 <= REGISTERS_OF_SM, entry


def test_the_epilogue_is_short(compiled: list[dict[str, Any]]) -> None:
    """Instructions per element after the last product: 12 to 14 by descriptors, when all is well."""
    for entry in _named(compiled, "linear_importance", "descriptors"):
        assert 0 < _per_element(entry, "epilogue") <= 15.5, entry
    for entry in _named(compiled, "linear_importance", "pointers"):
        budget = 28 if "ragged" in entry["name"] else 18
        assert _per_element(entry, "epilogue") <= budget, entry


def test_loops_wait_for_little(compiled: list[dict[str, Any]]) -> None:
    """A barrier in the loop makes a block's warps wait for each other at every step."""
    for name, budget in (("linear_importance", 4), ("taylor_score", 6), ("mask_gradient", 0)):
        for entry in _named(compiled, name):
            assert entry["loop_barriers"] <= budget, entry


def test_loops_are_short(compiled: list[dict[str, Any]]) -> None:
    """Instructions per element of a loop's step, where the memory is to be the limit."""
    for name, budget in (("taylor_score rows", 30), ("taylor_score columns", 22), ("mask_gradient", 12)):
        for entry in _named(compiled, name):
            assert 0 < _per_element(entry, "loop") <= budget, entry
