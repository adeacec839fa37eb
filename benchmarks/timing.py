"""Timing: several providers of one op, checked first, then timed in turn on cold inputs.

Every repeat gives each provider one turn, so that a busy machine slows them alike. Inputs are cold: on the CPU each
turn takes the next of several input sets, together larger than the last-level cache; on a GPU the L2 cache is
overwritten before each turn, and events time the turn alone.
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

_FLUSH_BYTES = 256 << 20
_MIN_REPEATS = 3
# Tiny inputs would need very many sets; where they do not fill the cache, the fixed costs of a call are what is timed.
_MOST_SETS = 256
# Before a turn on the CPU; see _preparation.
_SETTLING_SECONDS = 0.01


@dataclass(frozen=True)
class Provider:
    """Someone who does the work.

    run: called with the fields of one input set; returns its result.
    check: given a result and the inputs it was made of, what is wrong with it, or None; always the same inputs.
    floor: it does not do the work, but what the work costs at least (a copy, a plain GEMM).
    """

    name: str
    run: Callable[..., Any]
    check: Callable[[Any, tuple[Any, ...]], str | None]
    floor: bool = False


@dataclass(frozen=True)
class Timing:
    """Milliseconds at the 20th, 50th and 80th percentile of `repeats` turns; None with an `error` instead."""

    p20: float | None
    p50: float | None
    p80: float | None
    repeats: int = 0
    error: str | None = None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Percentiles of measured times."""
        quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        p20, p50, p80 = (torch.tensor(seconds, dtype=torch.float64).quantile(quantiles) * 1e3).tolist()
        return cls(p20, p50, p80, len(seconds))

    @classmethod
    def failed(cls, error: str) -> "Timing":
        """No timing, and why."""
        return cls(None, None, None, error=error)

    def values(self) -> dict[str, Any]:
        """As fields of a record."""
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
    """Check every provider, then time those that are right, in turn.

    Args:
        providers: names differ.
        make_inputs: from a number to a set of inputs; the same number makes the same set.
        input_bytes: size of one set, to tell how many are needed to be cold.
        device: "cpu" or "cuda".
        repeats: turns of each provider at most. seconds: no further repeat is begun after so long (three are made).
            Who needs that long for one turn has no further one.

    Returns:
        By provider: its timing, or why there is none: a wrong result is not timed, and running out of memory is a
        result too.
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
    """Whether an exception says that there was no memory, of the GPU or of the host."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def free(device: str) -> None:
    """Give cached memory back, so that one provider's garbage is not another's shortage."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _fault(provider: Provider, inputs: tuple[Any, ...]) -> str | None:
    """What keeps a provider from being timed. The call also compiles what has to be compiled."""
    try:
        fault = provider.check(provider.run(*_clone(inputs)), inputs)
    except Exception as error:  # whatever a peer or a compiler raises is its result, and is recorded
        return f"out of memory: {first_line(error)}" if out_of_memory(error) else first_line(error)
    return None if fault is None else f"wrong result: {fault}"


def _clone(inputs: Any) -> Any:
    """A copy, as an op may work in place."""
    if isinstance(inputs, torch.Tensor):
        return inputs.clone()
    return type(inputs)(_clone(value) for value in inputs)


def _cold_inputs(make_inputs: Callable[[int], tuple[Any, ...]], input_bytes: int, device: str) -> list[tuple[Any, ...]]:
    if device == "cuda":
        return [make_inputs(0)]
    # Twice the cache: when a set's turn comes again, nothing of it is left.
    sets = -(-2 * last_level_cache_bytes() // max(input_bytes, 1)) + 1
    return [make_inputs(number) for number in range(min(sets, _MOST_SETS))]


def _alternate(
    providers: Sequence[Provider], inputs: list[tuple[Any, ...]], device: str, repeats: int, seconds: float
) -> dict[str, Timing]:
    times: dict[str, list[float]] = {provider.name: [] for provider in providers}
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
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
    """What comes before each turn: on a GPU the L2 cache is overwritten, on a CPU all cores read other memory a while.

    So what the turn before left behind on a CPU is not timed: results in the cache that are yet to be written to
    memory, freed memory on its way back to the system, threads that fell asleep.
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


def _cuda_seconds(run: Callable[..., Any], inputs: tuple[Any, ...], prepare: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # This also keeps the GPU busy while the host enqueues the run: its launches are not part of the time.
    prepare()
    start.record()
    run(*inputs)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3
