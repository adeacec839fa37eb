import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels are NOT compiled here")


def test_every_kernel_compiles_for_sm_80_and_sm_90_without_spills(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    program = Path(__file__).resolve().parents[1] / "helpers" / "compile_kernels.py"
    run = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    # taylor_score in three dtypes; linear_importance in three variants each; two targets.
    assert len(lines) == 2 * (3 + 3 * 3)
    # Spilled registers live in local memory, on the stack.
    assert all("STACK:0" in line and "LOCAL:0" in line for line in lines), run.stdout
    # wgmma is what makes Hopper's tensor cores run at full rate; fp32 is multiplied in fp32 and has none.
    for line in lines:
        tensor_cores = "linear_importance" in line and "sm_90" in line and "fp32" not in line
        assert line.endswith("no wgmma") != tensor_cores, line
