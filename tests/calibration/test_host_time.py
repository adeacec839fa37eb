"""The host time of a step relative to the plain pass, measured without a GPU: gates, and an engine that fails them.

Each measurement runs in a process of its own, in which Triton does not interpret its kernels.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: the host's time of its launches is NOT measured here")

ROOT = Path(__file__).resolve().parents[2]
MOST = 1.3
MEASURE = """
import json, sys
from benchmarks.predicted.host import host_ratio
evidence, recompute, seconds = sys.argv[1], sys.argv[2] == "True", float(sys.argv[3])
if seconds:
    import time
    from gradprune.calibration.accumulator import LinearAccumulator
    observe = LinearAccumulator._observe_output
    def slow(*arguments):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        observe(*arguments)
    LinearAccumulator._observe_output = slow
print(json.dumps(host_ratio(evidence, 7, recompute)))
"""


def ratio(evidence: str, recompute: bool = True, slower: float = 0.0) -> float:
    """The host time of a step divided by that of the plain pass; `slower`: seconds that the engine wastes per block."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    variables.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, evidence, str(recompute), str(slower)]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    found: float = json.loads(run.stdout.splitlines()[-1])
    return found


def assert_at_most(most: float, evidence: str, recompute: bool = True) -> None:
    """Check that one of up to three measurements is small enough: other work on the same cores makes some larger."""
    found: list[float] = []
    while not found or (found[-1] > most and len(found) < 3):
        found.append(ratio(evidence, recompute))
    assert 0.5 < found[-1] <= most, found


@pytest.mark.parametrize("evidence", ["needed", "all", "needed by obs", "all, with obs"])
def test_a_step_takes_the_host_little_longer_than_the_plain_pass(evidence: str) -> None:
    """Activations are recomputed, as for large models. If no weight gradient is needed, a step must take even less."""
    assert_at_most(1.1 if evidence.startswith("needed") else MOST, evidence)


def test_without_recomputation_and_weight_gradients_the_host_time_is_small_too() -> None:
    assert_at_most(MOST, "needed", recompute=False)


def test_a_slower_engine_fails_the_gates() -> None:
    """A millisecond more for each block fails the gates."""
    assert ratio("all", slower=1e-3) > MOST
    assert ratio("needed", slower=1e-3) > 1.1
