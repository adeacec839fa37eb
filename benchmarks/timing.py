"""Timing: all providers of one op are checked first, then timed by turns on cold inputs.

In every repeat each provider has one turn, so that a busy machine slows all of them alike. Inputs are cold: on the CPU
consecutive turns use different input sets, together larger than the last-level cache; on a GPU the L2 cache is
overwritten before each turn, and CUDA events time only the turn.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.environment import last_level_cache_bytes
from benchmarks.progress import say

# Seconds that the GPU spins before a turn, while the host enqueues the turn's kernels: initially, and at most. If the
# host takes longer than the spin, the turn is repeated with a longer one: the time is to be the kernels', not Python's.
_SPIN, _LONGEST_SPIN = 1e-3, 60e-3
# Length of the spin that is timed to learn how many cycles a second has.
_SPIN_CYCLES = 4_000_000
_FLUSH_BYTES = 256 << 20
_MIN_REPEATS = 3
# Limit on the number of input sets. Tiny inputs then fit in the cache, but for them the fixed cost of a call dominates.
_MOST_SETS = 256
# How long the cores are kept busy before a turn on the CPU; see _preparation.
_SETTLING_SECONDS = 0.01


@dataclass(frozen=True)
class Provider:
    """One implementation of an op.

    run: function from the tensors of one input set to the result.
    check: function from a result and its inputs (always input set 0) to what is wrong with it, None if it is right.
    floor: whether it does not compute the result, but has the minimum cost of doing so (a copy, a plain GEMM).
    """

    name: str
    run: Callable[..., Any]
    check: Callable[[Any, tuple[Any, ...]], str | None]
    floor: bool = False


@dataclass(frozen=True)
class Timing:
    """Milliseconds at the 20th, 50th and 80th percentile of `repeats` turns; None if there is an `error` instead."""

    p20: float | None
    p50: float | None
    p80: float | None
    repeats: int = 0
    error: str | None = None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """The timing with the percentiles of measured seconds."""
        quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        p20, p50, p80 = (torch.tensor(seconds, dtype=torch.float64).quantile(quantiles) * 1e3).tolist()
        return cls(p20, p50, p80, len(seconds))

    @classmethod
    def failed(cls, error: str) -> "Timing":
        """A timing without times, and the reason why there are none."""
        return cls(None, None, None, error=error)

    def values(self) -> dict[str, Any]:
        """The timing as fields of a record."""
        return {
            "ms_p20": self.p20, "ms_p50": self.p50, "ms_p80": self.p80, "repeats": self.repeats, "error": self.error
        }  # fmt: skip


def measure(
    providers: Sequence[Provider],
    make_inputs: Callable[[int], tuple[Any, ...]],
    input_bytes: int,
    *,
    device: str,
    repeats: int,
    seconds: float,
) -> dict[str, Timing]:
    """Check every provider, then time those whose result is right, by turns.

    Args:
        providers: providers with distinct names.
        make_inputs: function from a number to an input set; the same number gives the same set.
        input_bytes: size of one set, which determines how many sets keep the inputs cold.
        device: "cpu" or "cuda".
        repeats: largest number of turns per provider.
        seconds: after this time no further repeat begins, but three are always made. A provider whose first turn takes
            longer than this has no second one.

    Returns:
        The timing of each provider by name, or the reason why there is none: a wrong result is not timed, and running
        out of memory is a result too.
    """
    faults: dict[str, str] = {}
    inputs = make_inputs(0)
    for provider in providers:
        fault = _fault(provider, inputs)
        if fault is not None:
            say(f"{provider.name}: {fault}")
            faults[provider.name] = fault
    del inputs
    right = [provider for provider in providers if provider.name not in faults]
    found = {name: Timing.failed(fault) for name, fault in faults.items()}
    if right:
        found |= _alternate(right, _cold_inputs(make_inputs, input_bytes, device), device, repeats, seconds)
    return {provider.name: found[provider.name] for provider in providers}


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the GPU or the host ran out of memory."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def free(device: str) -> None:
    """Free cached memory, so that one provider's garbage does not leave another short of memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _fault(provider: Provider, inputs: tuple[Any, ...]) -> str | None:
    """Why a provider cannot be timed, or None. The call also triggers compilation."""
    try:
        fault = provider.check(provider.run(*_clone(inputs)), inputs)
    except Exception as error:  # whatever a peer or a compiler raises is recorded as its result
        return f"out of memory: {first_line(error)}" if out_of_memory(error) else first_line(error)
    return None if fault is None else f"wrong result: {fault}"


def _clone(inputs: Any) -> Any:
    """A copy, because an op may work in place."""
    if isinstance(inputs, torch.Tensor):
        return inputs.clone()
    return type(inputs)(_clone(value) for value in inputs)


def _cold_inputs(make_inputs: Callable[[int], tuple[Any, ...]], input_bytes: int, device: str) -> list[tuple[Any, ...]]:
    if device == "cuda":
        return [make_inputs(0)]
    # Twice the size of the cache: by the time a set is used again, it has been evicted.
    sets = -(-2 * last_level_cache_bytes() // max(input_bytes, 1)) + 1
    return [make_inputs(number) for number in range(min(sets, _MOST_SETS))]


def _alternate(
    providers: Sequence[Provider], inputs: list[tuple[Any, ...]], device: str, repeats: int, seconds: float
) -> dict[str, Timing]:
    times: dict[str, list[float]] = {provider.name: [] for provider in providers}
    clock = CudaClock() if device == "cuda" else _cpu_seconds
    turn = 0
    with _preparation(device) as prepare:
        start = time.perf_counter()
        for repeat in range(repeats):
            if repeat >= _MIN_REPEATS and time.perf_counter() - start > seconds:
                break
            for provider in providers:
                if not times[provider.name] or times[provider.name][0] < seconds:
                    times[provider.name].append(clock(provider.run, inputs[turn % len(inputs)], prepare))
                    turn += 1
    return {name: Timing.of(values) for name, values in times.items()}


@contextmanager
def _preparation(device: str) -> Iterator[Callable[[], object]]:
    """Yield what to call before each turn: on a GPU it overwrites the L2 cache, on a CPU it keeps all cores reading.

    Reading unrelated memory for a while keeps after-effects of the previous turn out of the timing: dirty cache lines
    that are yet to be written back, freed memory that is being returned to the system, threads that have gone to sleep.
    """
    if device == "cuda":
        yield torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_
        return
    numbers = torch.ones(2 * last_level_cache_bytes() // 4)

    def settle() -> None:
        end = time.perf_counter() + _SETTLING_SECONDS
        while time.perf_counter() < end:
            numbers.sum()

    yield settle


def _cpu_seconds(run: Callable[..., Any], inputs: tuple[Any, ...], prepare: Callable[[], object]) -> float:
    prepare()
    start = time.perf_counter()
    run(*inputs)
    return time.perf_counter() - start


class CudaClock:
    """Clock of the seconds that a turn's kernels take back to back, however long the host needs to enqueue them."""

    def __init__(self) -> None:
        """Time a spin, to learn the device's clock rate, after another spin that wakes the device."""
        torch.cuda._sleep(_SPIN_CYCLES)
        self._cycles_per_second = _SPIN_CYCLES / self._between(lambda: torch.cuda._sleep(_SPIN_CYCLES))
        self._spins: dict[Callable[..., Any], float] = {}

    def __call__(self, run: Callable[..., Any], inputs: tuple[Any, ...], prepare: Callable[[], object]) -> float:
        """Seconds of one turn of `run`, after `prepare`."""
        while True:
            spin = self._spins.get(run, _SPIN)
            host = 0.0

            def enqueue() -> None:
                nonlocal host
                start = time.perf_counter()
                run(*inputs)
                host = time.perf_counter() - start

            prepare()
            torch.cuda._sleep(int(spin * self._cycles_per_second))
            seconds = self._between(enqueue)
            if host < spin or spin >= _LONGEST_SPIN:
                return seconds
            self._spins[run] = min(2.0 * host, _LONGEST_SPIN)

    @staticmethod
    def _between(enqueue: Callable[[], object]) -> float:
        """Seconds on the device between an event recorded before `enqueue` and one recorded after it."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        enqueue()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3
