"""NVIDIA's checker of memory accesses and races finds no error in a small launch of every Triton kernel."""

import shutil
import sys

import pytest

from helpers.programs import run_program

# Time limit of each tool in seconds. Both may run in one process of the tests, which have 170 s in total.
SECONDS = 60.0

PROGRAM = """
import torch
from gradprune.ops import cheapest_removals, linear_importance, mask_gradient, taylor_score
x, dy, w = (torch.randn(shape, device="cuda").bfloat16() for shape in ((2, 70, 130), (2, 70, 150), (150, 130)))
linear_importance(x, dy, w, backend="triton")
taylor_score(w, w.clone(), backend="triton")
mask_gradient(x, x.clone(), backend="triton")
eye = torch.eye(40, dtype=torch.float64, device="cuda")
cheapest_removals(eye, eye, 1, 20, "triton")
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_kernel_reads_or_writes_where_it_must_not(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is NOT here: the kernels' memory accesses are NOT checked")
    # In memory from the caching allocator, an access beyond a tensor would not be noticed.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Errors of the driver's functions are not errors of a kernel: libraries call functions that may be missing.
    options = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}[tool]
    command = [sanitizer, "--tool", tool, *options, "--error-exitcode", "9", sys.executable, "-c", PROGRAM]
    try:
        run = run_program(command, environment=environment, deadline=SECONDS)
    except AssertionError:
        pytest.skip(f"{tool} took more than {SECONDS:.0f} s: the kernels' memory accesses are NOT checked")
    if "Device not supported" in run.stdout + run.stderr:
        pytest.skip("compute-sanitizer does NOT support this device: the kernels' memory accesses are NOT checked")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "ERROR SUMMARY: 0 errors" in run.stdout or "0 hazards" in run.stdout
