"""csrc/cuda compiles for every shipped architecture, without a GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: csrc/cuda is NOT compiled here")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_compiles_without_spills(architecture: str, tmp_path: Path) -> None:
    command = [NVCC, "-std=c++17", "-O3", f"-I{CSRC}", f"-arch={architecture}", "-Xptxas", "-v", "-c"]
    run = subprocess.run(
        [*command, CSRC / "cuda" / "gradients.cu", "-o", tmp_path / "gradients.o"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert len(spills) == 3
    assert all(counts == ("0", "0", "0") for counts in spills), run.stderr
