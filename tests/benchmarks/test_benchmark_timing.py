"""Timing: providers take turns, and a provider whose result is wrong is not timed."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.op import Case
from benchmarks.kernels.run import OPS, records
from benchmarks.timing import CudaClock, Provider, Timing, measure


class Log:
    """Makes providers, and records their calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def provider(self, name: str, fault: str | None = None, error: Exception | None = None) -> Provider:
        def run(number: Tensor) -> Tensor:
            if error is not None:
                raise error
            self.calls.append((name, int(number)))
            return number

        return Provider(name, run, lambda _result, _inputs: fault)


def inputs(number: int) -> tuple[Tensor]:
    return (torch.tensor(number),)


def run(providers: list[Provider], repeats: int = 4, input_bytes: int = 1 << 40) -> dict[str, Timing]:
    return measure(providers, inputs, input_bytes, device="cpu", repeats=repeats, seconds=60.0)


def test_every_repeat_gives_each_provider_a_turn() -> None:
    log = Log()
    found = run([log.provider("a"), log.provider("b"), log.provider("c")])
    timed = [name for name, _ in log.calls[3:]]  # each provider is checked first
    assert timed == ["a", "b", "c"] * 4
    assert all(timing.repeats == 4 and timing.p20 <= timing.p50 <= timing.p80 for timing in found.values())


def test_every_turn_takes_the_next_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.last_level_cache_bytes", lambda: 1000)
    log = Log()
    run([log.provider("a"), log.provider("b")], repeats=6, input_bytes=500)
    turns = [number for _, number in log.calls[2:]]
    # Five sets of 500 bytes are more than twice the cache.
    assert turns == [turn % 5 for turn in range(12)]


def test_a_wrong_result_is_not_timed() -> None:
    log = Log()
    found = run([log.provider("right"), log.provider("wrong", fault="it is off by 1")])
    assert found["wrong"] == Timing(None, None, None, 0, "wrong result: it is off by 1")
    assert found["right"].repeats == 4
    assert log.calls.count(("wrong", 0)) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "out of memory: OutOfMemoryError: CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: RuntimeError"),
        (ValueError("no"), "ValueError: no"),
    ],
)
def test_a_failure_is_recorded_as_a_result(error: Exception, expected: str) -> None:
    log = Log()
    found = run([log.provider("fails", error=error), log.provider("works")])
    assert found["fails"].error.startswith(expected)
    assert found["fails"].p50 is None
    assert found["works"].p50 is not None


@pytest.mark.parametrize(("turn", "turns"), [(0.11, 4), (0.5, 3), (2.0, 1)])
def test_no_repeat_begins_after_the_time_is_up(turn: float, turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three repeats are made in any case, unless a single one takes all the time."""
    clock = count(step=turn)  # each reading advances it: two per turn, and one between turns from the third on
    monkeypatch.setattr("benchmarks.timing._preparation", lambda _device: nullcontext(lambda: None))
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: next(clock))
    log = Log()
    measure([log.provider("a")], inputs, 1 << 40, device="cpu", repeats=100, seconds=1.0)
    assert len(log.calls) == 1 + turns


class Device:
    """A stand-in for a GPU: the host's and the device's clocks, in seconds."""

    def __init__(self, patch: pytest.MonkeyPatch, cycles_per_second: float = 1e9) -> None:
        self.host = self.device = 0.0
        self.spins: list[float] = []
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = max(device.device, device.host)

            def elapsed_time(self, end: "Event") -> float:
                return 1e3 * (end.at - self.at)

        def spin(cycles: int) -> None:
            self.spins.append(cycles / cycles_per_second)
            self.enqueue(self.spins[-1])

        def wait() -> None:
            self.host = max(self.host, self.device)

        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "_sleep", spin)
        patch.setattr(torch.cuda, "synchronize", wait)
        patch.setattr("benchmarks.timing.time.perf_counter", lambda: self.host)

    def enqueue(self, seconds: float, python: float = 0.0) -> None:
        """Enqueue a kernel that runs for `seconds` on the device; enqueuing it takes `python` seconds on the host."""
        self.host += python
        self.device = max(self.device, self.host) + seconds


@pytest.mark.parametrize(("kernel", "python"), [(2e-5, 1e-5), (2e-5, 3e-4), (2e-5, 5e-3), (1e-2, 1e-4)])
def test_kernels_are_timed_without_the_time_of_python(kernel: float, python: float, monkeypatch) -> None:
    device = Device(monkeypatch)
    clock = CudaClock()

    def run() -> None:
        for _ in range(7):
            device.enqueue(kernel / 7, python / 7)

    turns = [clock(run, (), lambda: None) for _ in range(3)]
    assert turns == pytest.approx([kernel] * 3)
    longer = python > 1e-3
    # Two spins measure how long a spin takes, one more may be too short, and each turn has one.
    assert len(device.spins) == 2 + longer + 3
    assert device.spins[-1] == pytest.approx(2 * python if longer else 1e-3)


def test_an_op_with_too_much_python_is_timed_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    assert CudaClock()(lambda: device.enqueue(1e-3, python=1.0), (), lambda: None) > 0.9


def toy_case(op: str, dtype: str = "fp32") -> Case:
    return next(case for case in OPS[op].cases("cpu", "toy") if case.dtype == dtype)


def corrupted(result: Any) -> Any:
    """Return a result that is slightly wrong."""
    if isinstance(result, Tensor):
        return result * 1.01
    if isinstance(result, list):
        return [result[0] * 1.01, *result[1:]]
    if isinstance(result, tuple):
        return type(result)(result[0] * 1.05, *result[1:])
    first = fields(result)[0].name
    return replace(result, **{first: getattr(result, first) * 1.05})


TYPES = [(name, dtype) for name, op in OPS.items() for dtype in sorted({c.dtype for c in op.cases("cpu", "toy")})]


@pytest.mark.parametrize(("name", "dtype"), TYPES)
def test_each_ops_check_accepts_right_results_and_refuses_wrong_ones(name: str, dtype: str) -> None:
    op, case = OPS[name], toy_case(name, dtype)
    providers = [provider for provider in op.providers(case, "cpu") if not provider.floor]
    assert {"eager", "gradprune cpp"} <= {provider.name for provider in providers}
    for provider in providers:
        broken = replace(provider, run=breaking(provider.run))
        found = measure(
            [replace(provider, name="right"), replace(broken, name="wrong")],
            lambda number: op.inputs(case, number, "cpu"),
            op.input_bytes(case),
            device="cpu",
            repeats=1,
            seconds=0.0,
        )
        assert found["right"].error is None, provider.name
        assert found["wrong"].error.startswith("wrong result"), provider.name


def breaking(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values: corrupted(run(*values))


def test_rates_relate_to_the_fastest_floor() -> None:
    op, case = OPS["taylor_score"], toy_case("taylor_score")
    providers = [
        Provider(name, print, lambda *_: None, floor=name.startswith("floor")) for name in ("floor 1", "floor 2", "us")
    ]
    times = {"floor 1": 4.0, "floor 2": 2.0, "us": 8.0}
    found = records(op, case, providers, {name: Timing(t, t, t, 3) for name, t in times.items()}, "cpu")
    assert [made.percent_of_floor for made in found] == [50.0, 100.0, 25.0]
    moved = 2 * case.elements * 4
    assert found[2].gb_per_s == pytest.approx(moved / 8e-3 / 1e9)
    assert found[2].bytes == moved


@pytest.mark.parametrize("name", ["linear_importance", "grouped_linear_importance"])
def test_on_a_gpu_each_provider_computes_the_one_side_that_its_operations_are_counted_for(name: str) -> None:
    """On a GPU both sides would take two products, and the engine requests only one side."""
    pytest.importorskip("triton", reason="triton is not installed: its provider is NOT tested here")
    op = OPS[name]
    case = op.cases("cpu", "toy")[0]
    inputs = op.inputs(case, 0, "cpu")
    providers = {provider.name: provider for provider in op.providers(case, "cuda") if not provider.floor}
    assert set(providers) == {"eager", "gradprune triton"}
    for provider in providers.values():
        found = provider.run(*inputs)
        assert found.rows is not None
        assert found.columns is None
        assert provider.check(found, inputs) is None


def test_the_baselines_of_experts_wait_for_no_offsets_on_the_device() -> None:
    """Reading the offsets would end the spin, so that the time to enqueue a GEMM per expert would be measured."""
    op = OPS["grouped_linear_importance"]
    case = op.cases("cpu", "toy")[0]
    x, dy, w, offsets, *of_host = op.inputs(case, 0, "cpu")
    inputs = x, dy, w, offsets.to("meta"), *of_host
    baselines = [provider for provider in op.providers(case, "cpu") if not provider.name.startswith("gradprune")]
    assert [provider.name for provider in baselines] == ["torch.mm by expert", "eager"]
    for provider in baselines:
        assert provider.check(provider.run(*inputs), inputs) is None
