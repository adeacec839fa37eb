"""Run the CUDA compiler in tests that need no GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def nvcc(*arguments: str) -> str:
    """Run nvcc with warnings as errors and return what it prints; skip the test if nvcc is not installed."""
    program = shutil.which("nvcc")
    if program is None:
        pytest.skip("nvcc is not on the PATH: the CUDA kernels are NOT compiled here")
    command = [
        program,
        "-std=c++17",
        "-O3",
        "-Werror",
        "all-warnings",
        "-Xcompiler",
        "-Wall,-Wextra",
        f"-I{CSRC}",
        *arguments,
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr
