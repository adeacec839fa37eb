"""taylor_score on the CPU: eager PyTorch, torch.compile and C++ against a copy of the same bytes.

    python -m benchmarks.kernels.cpu_taylor_score [--rows 4096] [--columns 2816] [--repeats 60]

All providers take turns in one run, on the same inputs, so that a busy machine slows them alike. Every turn takes the
next of several pairs of inputs, together far larger than the last-level cache: inputs are cold.

GB/s: bytes of W and G over the time. The copy is given as many bytes in all, half read and half written.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradprune.gradients.cpp import require_extension
from gradprune.importance.cpp import taylor_score_cpp
from gradprune.importance.reference import taylor_score_reference

Run = Callable[[Tensor, Tensor], object]

COLD_BYTES = 256 << 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Measurement:
    """Milliseconds at the 20th, 50th and 80th percentile, and GB/s at the median."""

    p20: float
    p50: float
    p80: float
    gigabytes_per_second: float


def measure(providers: dict[str, Run], inputs: list[tuple[Tensor, Tensor]], repeats: int) -> dict[str, Measurement]:
    """Time every provider `repeats` times in alternation, each time on the next pair of inputs."""
    for run in providers.values():
        run(*inputs[0])
    times: dict[str, list[float]] = {name: [] for name in providers}
    turn = 0
    for _ in range(repeats):
        for name, run in providers.items():
            w, g = inputs[turn % len(inputs)]
            turn += 1
            start = time.perf_counter()
            run(w, g)
            times[name].append(time.perf_counter() - start)
    size = inputs[0][0].nbytes + inputs[0][1].nbytes
    return {name: _summary(values, size) for name, values in times.items()}


def _summary(seconds: list[float], size: int) -> Measurement:
    p20, p50, p80 = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return Measurement(p20 * 1e3, p50 * 1e3, p80 * 1e3, size / p50 / 1e9)


def _random(rows: int, columns: int, dtype: str) -> Tensor:
    return torch.randn(rows, columns).to(DTYPES[dtype])


def compiled_reference(w: Tensor, g: Tensor) -> tuple[Run | None, str]:
    """The reference under torch.compile and "", or None and why it does not compile."""
    torch._dynamo.reset()
    compiled = torch.compile(taylor_score_reference, fullgraph=True)
    try:
        compiled(w, g)
    except Exception as error:  # the compiler's failures have no common base class, and the reason is shown
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return compiled, ""


def copy_same_bytes(w: Tensor, g: Tensor) -> None:
    """Read W and write G: as many bytes as reading both."""
    g.copy_(w)


def benchmark(dtype: str, rows: int, columns: int, repeats: int) -> None:
    """Measure one element type and print its table."""
    size = 2 * rows * columns * DTYPES[dtype].itemsize
    pairs = max(3, -(-COLD_BYTES // size))
    inputs = [(_random(rows, columns, dtype), _random(rows, columns, dtype)) for _ in range(pairs)]
    providers: dict[str, Run] = {"copy": copy_same_bytes, "eager": taylor_score_reference}
    compiled, reason = compiled_reference(*inputs[0])
    if compiled is not None:
        providers["compile"] = compiled
    providers["cpp"] = taylor_score_cpp
    found = measure(providers, inputs, repeats)
    ours = found["cpp"]
    print(f"\n{dtype} [{rows}, {columns}]: {size / 1e6:.1f} MB, {pairs} pairs in rotation, {repeats} repeats")
    print(f"{'provider':<10}{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}{'GB/s':>8}{'% copy':>8}{'cpp is':>10}")
    for name, m in found.items():
        percent = 100 * m.gigabytes_per_second / found["copy"].gigabytes_per_second
        print(
            f"{name:<10}{m.p20:>10.3f}{m.p50:>10.3f}{m.p80:>10.3f}{m.gigabytes_per_second:>8.1f}{percent:>8.0f}"
            f"{m.p50 / ours.p50:>9.2f}x"
        )
    if reason:
        print(f"compile   skipped: {reason}")


def main() -> None:
    """Print the tables of the element types asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=2816)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--dtype", choices=[*DTYPES, "all"], default="all")
    options = parser.parse_args()
    require_extension()
    from gradprune import _C

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {_C.build_info()}")
    for dtype in DTYPES if options.dtype == "all" else [options.dtype]:
        benchmark(dtype, options.rows, options.columns, options.repeats)


if __name__ == "__main__":
    main()
