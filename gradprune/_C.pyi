"""The C++ extension. Memory is passed as addresses (`Tensor.data_ptr()`), and callers keep it alive."""

from collections.abc import Sequence
from typing import TypedDict

class BuildInfo(TypedDict):
    """What this build contains and what of it this CPU can run.

    isa: the instruction set that "auto" uses on this CPU. isas: those that this build has and this CPU supports.
    openmp, cuda: whether the build includes them. compiler: the compiler's version.
    """

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
"""The names of the five statistics, in the order in which the ops write them."""

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
    """Compute sums of a weight times its gradient, and the gradient's statistics.

    w, g: (address, row stride in elements, type code). side: "rows", "columns" or "both".
    outputs: addresses of row_abs, row_square, column_abs, column_square and statistics; 0 for a side not computed.
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
    """Compute `taylor_score` of each sample's weight gradient, summed over samples.

    x, dy: (address, sample stride, token stride, type code), strides in elements.
    sizes: numbers of samples, tokens, rows and columns. w, side, outputs: see `taylor_score`.
    """

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
    """Compute `linear_importance` of each expert's weight on the expert's tokens.

    x, dy: see `linear_importance`; all tokens are passed as one sample. w: the first expert's weight.
    offsets: for each expert, the token at which each sample begins; then the end of the last.
    sizes: numbers of experts, samples, rows and columns.
    outputs: the first expert's addresses in sums [experts, 2, length] and statistics [experts, 5].
    """

def mask_gradient(
    x: tuple[int, int, int, int],
    dx: tuple[int, int, int, int],
    sizes: tuple[int, int, int],
    outputs: tuple[int, int],
    threads: int,
    isa: str = "auto",
) -> None:
    """Compute the sums over tokens of x dx and of x^2, for each sample.

    x, dx: see x of `linear_importance`; both have the same type. sizes: numbers of samples, tokens and columns.
    outputs: addresses of [samples, columns] each, for the sums of x dx and of x^2.
    """

def cheapest_removals(
    inverse: tuple[int, int],
    gram: tuple[int, int],
    columns: int,
    count: int,
    outputs: tuple[int, int],
    isa: str = "auto",
) -> None:
    """Remove the cheapest column `count` times.

    inverse, gram: (address, row stride) of fp64 matrices [columns, columns].
    outputs: addresses of the removed columns, [count] int64, and of their costs, [count] fp64.
    """

def grad_stats(gradients: Sequence[tuple[int, int, int]], out: int, threads: int, isa: str = "auto") -> None:
    """Write the statistics of K gradients, each given as (address, elements, type code), to `out`: [K, 5] fp64."""

def scale_gradients(
    gradients: Sequence[tuple[int, int, int]], scales: Sequence[float], threads: int, isa: str = "auto"
) -> None:
    """Scale gradients, each given as (address, elements, type code), in place."""

def grad_stats_cuda(
    chunks: tuple[int, int], first_chunks: int, gradients: int, of_chunks: int, out: int, stream: int
) -> None:
    """Write the statistics of gradients on the current device to `out`; exists only if `build_info()["cuda"]`.

    chunks: (address, number of rows) of the table that `gradprune.ops.cuda.chunk_rows` describes. first_chunks: address
    of [gradients + 1] int64. gradients: their number. of_chunks: address of scratch memory [rows, 5] fp64. out: address
    of [gradients, 5] fp64. All of them are on the device, and the work is queued on `stream`.
    """

def scale_gradients_cuda(chunks: tuple[int, int], scales: int, stream: int) -> None:
    """Scale gradients on the current device in place; exists only if `build_info()["cuda"]`.

    chunks, stream: see `grad_stats_cuda`. scales: address of [gradients] fp64 on the device.
    """

def cuda_fault() -> str | None:
    """Return why CUDA kernels cannot run on the current device, or None; exists only if `build_info()["cuda"]`."""

def build_info() -> BuildInfo:
    """Return what this build contains, and what of it this CPU can run."""
