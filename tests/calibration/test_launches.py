"""Gates on the launches, bytes and memory of a step on a GPU, counted without one, at the shapes of Llama-3.

A gate that nothing fails proves nothing, so each is also tried on an engine that was made worse.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import pytest

pytest.importorskip("triton", reason="triton is not installed: its launches are NOT counted here")

from benchmarks.predicted.counted import Counted
from benchmarks.predicted.steps import engine_step, plain_step
from gradprune.calibration.accumulator import LinearAccumulator, SampleAccumulator
from gradprune.config import Method
from gradprune.kernels import linear_importance
from gradprune.kernels.linear_importance import WORKSPACE
from gradprune.models.blocks import OutputLinear

SAMPLES, TOKENS = 4, 2048
SIZES = {"8B": 4096, "70B": 8192, "405B": 16384}
# By what a step collects: the method, and whether the evidence of every method is collected.
EVIDENCE: dict[str, tuple[Method, bool]] = {
    "taylor_2nd": ("taylor_2nd", False),
    "group_fisher": ("group_fisher", False),
    "obs": ("obs", False),
    "all, with obs": ("obs", True),
}
# For a layer of seven projections: the most launches that the engine may add to the plain pass, and the most bytes, as
# a share of the plain pass's.
LAUNCHES = {"taylor_2nd": 33, "group_fisher": 10, "obs": 14, "all, with obs": 37}
BYTES = {"taylor_2nd": 0.14, "group_fisher": 0.03, "obs": 0.035, "all, with obs": 0.15}


@dataclass(frozen=True)
class Taken:
    """Steps of a model of one layer and of a model of two layers, with the engine and plain."""

    size: str
    evidence: str
    ours: tuple[Counted, Counted]
    plain: tuple[Counted, Counted]

    def added_by_a_layer(self, count: Callable[[Counted], int]) -> int:
        """The count that the engine adds to the plain pass for one more layer."""
        ((ours, plain),) = pairwise(count(two) - count(one) for one, two in (self.ours, self.plain))
        return ours - plain


def too_many_launches(taken: Taken) -> bool:
    return not 0 < taken.added_by_a_layer(lambda step: step.total) <= LAUNCHES[taken.evidence]


def too_many_bytes(taken: Taken) -> bool:
    of_plain = taken.plain[1].bytes - taken.plain[0].bytes
    return not 0 < taken.added_by_a_layer(lambda step: step.bytes) <= BYTES[taken.evidence] * of_plain


def too_much_memory(taken: Taken) -> bool:
    """Whether the engine's peak exceeds the plain pass's by more than the partial sums."""
    return taken.ours[1].peak > taken.plain[1].peak + WORKSPACE


def memory_that_grows(taken: Taken) -> bool:
    """Whether one more layer adds more to the peak than its input, from which it is recomputed, and a few vectors."""
    one, two = taken.ours
    return two.peak - one.peak > 1.01 * SAMPLES * TOKENS * SIZES[taken.size] * 2


def too_large_a_workspace(taken: Taken) -> bool:
    """Whether the partial sums of one product exceed their budget."""
    return taken.ours[1].workspace > WORKSPACE


GATES = (too_many_launches, too_many_bytes, too_much_memory, memory_that_grows, too_large_a_workspace)


def steps(size: str, evidence: str, samples: int = SAMPLES) -> Taken:
    method, every = EVIDENCE[evidence]
    return Taken(
        size,
        evidence,
        tuple(engine_step(size, layers, method, samples, TOKENS, every=every) for layers in (1, 2)),
        tuple(plain_step(size, layers, samples, TOKENS) for layers in (1, 2)),
    )


taken = cache(steps)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("evidence", EVIDENCE)
@pytest.mark.parametrize("size", SIZES)
def test_a_step_is_within_its_budgets(size: str, evidence: str, gate: Callable[[Taken], bool]) -> None:
    """This also checks that no step reads anything back to the host, which would raise."""
    assert not gate(taken(size, evidence))


def test_all_memory_is_freed_in_the_end() -> None:
    assert [step.held for step in taken("8B", "taylor_2nd").ours] == [0, 0]


@pytest.mark.parametrize("evidence", EVIDENCE)
def test_an_engine_that_scores_twice_fails_the_gates(evidence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask = SampleAccumulator._observe_weight, LinearAccumulator._input_gradient

    def scored_twice(self, entry, x, dy):
        self._ops.linear_importance_uncounted(
            x, dy, entry.linear.weight, "columns" if isinstance(entry, OutputLinear) else "rows"
        )
        weight(self, entry, x, dy)

    monkeypatch.setattr(SampleAccumulator, "_observe_weight", scored_twice)
    monkeypatch.setattr(LinearAccumulator, "_input_gradient", lambda self, x, dx: mask(self, x.clone(), dx))
    found = steps("8B", evidence)
    assert too_many_launches(found)
    assert too_many_bytes(found)


def test_an_engine_that_keeps_gradients_fails_the_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    observe, kept = LinearAccumulator._observe, []
    monkeypatch.setattr(
        LinearAccumulator, "_observe", lambda self, entry, x, dy, dx: [kept.append(dy), observe(self, entry, x, dy, dx)]
    )
    found = steps("8B", "taylor_2nd")
    assert too_much_memory(found)
    assert memory_that_grows(found)


def test_partial_sums_of_many_samples_fit_only_if_samples_are_taken_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not too_large_a_workspace(steps("8B", "taylor_2nd", samples=32))
    monkeypatch.setattr(linear_importance, "samples_in_turn", lambda *_: 1)
    assert too_large_a_workspace(steps("8B", "taylor_2nd", samples=32))


def test_reading_a_value_on_the_host_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = LinearAccumulator._observe_mask

    def read(self, gradient, dy):
        gradient.sum().item()
        mask(self, gradient, dy)

    monkeypatch.setattr(LinearAccumulator, "_observe_mask", read)
    with pytest.raises(RuntimeError, match="meta"):
        engine_step("8B", 1, "group_fisher", SAMPLES, TOKENS)


def compilations(kernels: list[tuple[str, tuple[object, ...]]]) -> dict[str, int]:
    """How often each kernel is compiled."""
    return dict(Counter(name for name, _ in set(kernels)))


def test_a_model_needs_few_compilations_whatever_the_batches() -> None:
    """The product is compiled by rows and by columns, and both serve any number of samples and of tokens."""
    found = taken("8B", "taylor_2nd").ours[0].kernels
    assert compilations(found) == {"linear_importance": 2, "merge": 1, "add": 1, "mask_gradient": 1}
    other = engine_step("8B", 1, "taylor_2nd", 1, 1001).kernels
    assert compilations(found + other)["linear_importance"] == 2
