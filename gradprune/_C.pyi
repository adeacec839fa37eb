"""The C++ extension. Memory is given by address (`Tensor.data_ptr()`); callers keep it alive."""

from collections.abc import Sequence
from typing import TypedDict

class BuildInfo(TypedDict):
    """isa: what "auto" uses here. isas: available here. openmp, cuda: built in. compiler: its version."""

    isa: str
    isas: list[str]
    openmp: bool
    cuda: bool
    compiler: str

FLOAT32: int
BFLOAT16: int
FLOAT16: int
FLOAT64: int

def taylor_score(
    w: tuple[int, int, int],
    g: tuple[int, int, int],
    rows: int,
    columns: int,
    outputs: Sequence[int],
    threads: int,
    isa: str = "auto",
) -> None:
    """w, g: (address, row stride in elements, type). outputs: 7 addresses, in the order of `ImportanceVectors`."""

def grad_stats(gradients: Sequence[tuple[int, int, int]], out: int, threads: int, isa: str = "auto") -> None:
    """gradients: (address, elements, type) each. out: address of [K, 5] fp64."""

def scale_gradients(
    gradients: Sequence[tuple[int, int, int]], scales: Sequence[float], threads: int, isa: str = "auto"
) -> None:
    """gradients: (address, elements, type) each, scaled in place."""

def build_info() -> BuildInfo:
    """What this build has, and what of it this CPU can run."""

# Only where `build_info()["cuda"]`.
def grad_stats_cuda(
    runs: int, count: int, first_run: int, gradients: int, parts: int, out: int, stream: int
) -> None: ...
def scale_gradients_cuda(runs: int, count: int, scales: int, stream: int) -> None: ...
