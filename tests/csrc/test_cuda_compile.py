import re
from pathlib import Path

import pytest

from helpers.cuda_compiler import CSRC, nvcc

SOURCES = sorted((CSRC / "cuda").glob("*.cu"))


def test_there_are_sources() -> None:
    assert [source.stem for source in SOURCES] == ["grad_stats", "scale_gradients"]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_every_kernel_compiles_without_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    found = nvcc(f"-arch={architecture}", "-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "a.cubin"), str(source))
    kernels = source.read_text().count("__global__")
    assert found.count("Compiling entry function") == kernels
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", found)
    assert usage == [("0", "0", "0")] * kernels, found
    # Up to this number four blocks fit on a multiprocessor, with enough loads in flight to keep the memory busy.
    assert all(int(registers) <= 64 for registers in re.findall(r"Used (\d+) registers", found)), found
