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

STATISTICS: list[str]
"""Names of the five statistics, in the order in which the ops write them."""

def taylor_score(
    w: tuple[int, int, int],
    g: tuple[int, int, int],
    rows: int,
    columns: int,
    side: str,
    outputs: Sequence[int],
    threads: int,
    isa: str = "auto",
) -> None:
    """w, g: (address, row stride in elements, type). side: rows, columns or both.

    outputs: 5 addresses, in the order of `ImportanceVectors`; 0 for the side not asked for.
    """

def linear_importance(
    x: tuple[int, int, int, int],
    dy: tuple[int, int, int, int],
    w: tuple[int, int, int],
    sizes: tuple[int, int, int, int],
    side: str,
    outputs: Sequence[int],
    threads: int,
    isa: str = "auto",
) -> None:
    """x, dy: (address, strides between samples and tokens, type). sizes: samples, tokens, rows, columns."""

def grouped_linear_importance(
    x: tuple[int, int, int, int],
    dy: tuple[int, int, int, int],
    w: tuple[int, int, int],
    w_expert_stride: int,
    offsets: list[int],
    sizes: tuple[int, int, int, int],
    side: str,
    outputs: Sequence[int],
    threads: int,
    isa: str = "auto",
) -> None:
    """x, dy: as `linear_importance`'s, of all tokens as one sample. w: the first expert's weight.

    offsets: where the tokens of each expert begin by sample, and the end. sizes: experts, samples, rows, columns.
    outputs: the first expert's, of sums [experts, 2, length] and statistics [experts, 5].
    """

def mask_gradient(
    x: tuple[int, int, int, int],
    dx: tuple[int, int, int, int],
    sizes: tuple[int, int, int],
    outputs: tuple[int, int],
    threads: int,
    isa: str = "auto",
) -> None:
    """x, dx: as `linear_importance`'s x, of one type. sizes: samples, tokens, columns.

    outputs: addresses of [samples, columns] each: the sums over tokens of x dx, and of x^2.
    """

def cheapest_removals(
    inverse: tuple[int, int],
    gram: tuple[int, int],
    columns: int,
    count: int,
    outputs: tuple[int, int],
    isa: str = "auto",
) -> None:
    """inverse, gram: (address, row stride) of fp64 matrices [columns, columns].

    outputs: addresses of which columns go, [count] int64, and of what each costs, [count] fp64.
    """

def grad_stats(gradients: Sequence[tuple[int, int, int]], out: int, threads: int, isa: str = "auto") -> None:
    """gradients: (address, elements, type) each. out: address of [K, 5] fp64."""

def scale_gradients(
    gradients: Sequence[tuple[int, int, int]], scales: Sequence[float], threads: int, isa: str = "auto"
) -> None:
    """gradients: (address, elements, type) each, scaled in place."""

def grad_stats_cuda(
    chunks: tuple[int, int], first_chunks: int, gradients: int, of_chunks: int, out: int, stream: int
) -> None:
    """Only where `build_info()["cuda"]`. chunks: (address, rows) of a table on the device; see `gradprune.ops.cuda`."""

def scale_gradients_cuda(chunks: tuple[int, int], scales: int, stream: int) -> None:
    """Only where `build_info()["cuda"]`. chunks as above; scales: address of [gradients] fp64 on the device."""

def cuda_fault() -> str | None:
    """Only where `build_info()["cuda"]`. Why the CUDA kernels cannot run on the current device, or None."""

def build_info() -> BuildInfo:
    """What this build has, and what of it this CPU can run."""
