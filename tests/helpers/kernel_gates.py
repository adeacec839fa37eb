"""Gates on the compiled Triton kernels: budgets of resources and instructions, for GPUs that this machine may not have.

The budgets are slightly above what the kernels need. A change that exceeds one makes a kernel slower on a GPU, in a way
that no test on a CPU can see.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Compiled = dict[str, Any]
"""One compiled kernel: a line that `compile_kernels.py` prints."""

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks" / "predicted" / "compile_kernels.py"
# The version that torch 2.11 installs on a GPU machine. It is checked as well, because it generates other code.
OTHER = ROOT / ".venv" / "triton-3.6.0"

# Bytes by compute capability, the most that a block may have.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
SM_SHARED_MEMORY = 228 * 1024  # bytes of shared memory on Hopper, of which each block takes 1 KiB more than it asks for
SM_REGISTERS = 65536


def all_compiled(version: str) -> list[Compiled]:
    """Every kernel, compiled by the "installed" Triton or by another version; skip the test if that is not installed.

    Compiling takes a minute of one core, so the result is kept in .venv for each state of the kernels.
    """
    if version != "installed" and not OTHER.is_dir():
        pytest.skip(
            f"triton {version} is NOT checked here: it is not at {OTHER} "
            f"(pip install --no-deps --target {OTHER} triton=={version})"
        )
    kept = ROOT / ".venv" / "compiled-kernels" / f"{version}-{_digest()}.jsonl"
    if not kept.is_file():
        lines = compile_kernels(version)
        kept.parent.mkdir(parents=True, exist_ok=True)
        for old in kept.parent.glob(f"{version}-*.jsonl"):
            old.unlink(missing_ok=True)
        whole = kept.with_suffix(f".{os.getpid()}")
        whole.write_text(lines)
        whole.replace(kept)
    found = [json.loads(line) for line in kept.read_text().splitlines()]
    assert version == "installed" or {entry["triton"] for entry in found} == {version}
    return found


def compile_kernels(version: str, *arguments: str) -> str:
    """Run `compile_kernels.py` with the given version of Triton; return what it prints, a line for each kernel."""
    path = [str(ROOT)] if version == "installed" else [str(OTHER), str(ROOT)]
    # Everything is compiled anew, so that no earlier run's cached result is mistaken for this compiler's.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TRITON_ALWAYS_COMPILE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def _digest() -> str:
    """Digest of everything that determines the compiled code: kernels, program, installed Triton, torch and Python."""
    import torch
    import triton

    found = hashlib.sha256(f"{triton.__version__} {torch.__version__} {sys.version}".encode())
    for file in (*sorted((ROOT / "kernels").glob("*.py")), PROGRAM):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def spilled(entry: Compiled) -> bool:
    """Whether registers are spilled to memory; on the error path ("recount") they may be, because it need not be fast.

    8 bytes of stack are accepted in two cases: Triton 3.9.0 uses them in the persistent configuration, which is only
    measured and never chosen, and Triton 3.6.0 for compute capability 12.0, with any configuration.
    """
    if entry["name"].startswith("persistent") and entry["triton"] != "3.6.0":
        return bool(entry["stack"] > 8)
    if entry["capability"] == 120 and entry["triton"] == "3.6.0":
        return bool(entry["stack"] > 8)
    return bool(entry["stack"]) and not entry["name"].startswith("recount")


def too_large(entry: Compiled) -> bool:
    """Whether a block needs more shared memory than its device has."""
    return bool(entry["shared"] > SHARED_MEMORY[entry["capability"]])


def on_hoppers_tensor_cores(entry: Compiled) -> bool:
    """Whether a kernel's products run on Hopper's tensor cores, which cannot multiply fp32 in full precision."""
    return bool(entry["capability"] == 90 and entry["dtype"] != "fp32")


def slow_products(entry: Compiled) -> bool:
    """Whether products that could use wgmma or tcgen05, which data-centre GPUs need for their full rate, do not.

    Products that cannot run on these tensor cores must not use them.
    """
    at_full_rate = entry["capability"] in (90, 100) and entry["dtype"] != "fp32"
    return bool((entry["wgmma"] > 0) != at_full_rate)


def alone_on_its_sm(entry: Compiled) -> bool:
    """Whether two blocks do not fit on one SM, so that nothing else computes during a block's epilogue.

    On an SM of compute capability 12, where operands are in registers, there is room for only one.
    """
    if entry["capability"] == 120:
        return False
    registers = entry["registers"] * entry["warps"] * 32
    return bool(2 * (entry["shared"] + 1024) > SM_SHARED_MEMORY or 2 * registers > SM_REGISTERS)


def long_epilogue(budget: float) -> Callable[[Compiled], bool]:
    """Return a gate on instructions per element after the last wgmma; with descriptors, 12 to 14 are normal."""
    return lambda entry: on_hoppers_tensor_cores(entry) and not 0 < entry["epilogue"] / entry["elements"] <= budget


def waits(budget: int) -> Callable[[Compiled], bool]:
    """Return a gate on barriers in the loop: at each, a block's warps wait for each other in every iteration.

    On Blackwell's GPUs a loop that reads by descriptors has one more.
    """
    return lambda entry: (
        entry["loop_barriers"] > budget + (entry["capability"] >= 100 and "descriptors" in entry["name"])
    )


def long_loop(budget: float) -> Callable[[Compiled], bool]:
    """Return a gate on instructions per element in a loop that is meant to be limited by memory bandwidth."""
    return lambda entry: not 0 < entry["loop"] / entry["elements"] <= budget


# By name: whether an entry fails the gate, and words; the gate applies to the entries whose names contain all of them.
GATES: dict[str, tuple[Callable[[Compiled], bool], tuple[str, ...]]] = {
    "no register is spilled": (spilled, ()),
    "a block fits its device": (too_large, ()),
    "tensor cores run at full rate": (slow_products, ("linear_importance",)),
    "two blocks fit on an SM": (alone_on_its_sm, ("linear_importance", "stages=3", "descriptors")),
    "a short epilogue by descriptors": (long_epilogue(15.5), ("linear_importance", "descriptors")),
    "a short epilogue by pointers": (long_epilogue(18), ("linear_importance", "tail", "pointers")),
    "a short epilogue of ragged widths": (long_epilogue(28), ("linear_importance", "ragged", "pointers")),
    "a short epilogue of ragged tokens": (long_epilogue(30), ("grouped_linear_importance", "whole")),
    "a persistent loop with its epilogue": (long_epilogue(25), ("persistent",)),
    "linear_importance waits for little": (waits(4), ("linear_importance",)),
    "taylor_score waits for little": (waits(6), ("taylor_score",)),
    "mask_gradient waits for nothing": (waits(0), ("mask_gradient",)),
    "a short loop of taylor_score by rows": (long_loop(30), ("taylor_score rows",)),
    "a short loop of taylor_score by columns": (long_loop(22), ("taylor_score columns",)),
    "a short loop of mask_gradient": (long_loop(12), ("mask_gradient",)),
}


def refused(gate: str, found: list[Compiled]) -> Iterator[Compiled]:
    """Return the entries that fail a gate, after checking that the gate applies to at least one entry."""
    fails, words = GATES[gate]
    chosen = [entry for entry in found if all(word in entry["name"] for word in words)]
    assert chosen, words
    return filter(fails, chosen)
