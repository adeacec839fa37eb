"""Run all benchmarks in order, each in its own process and within its share of the time.

python -m benchmarks.run [--quick] [--device cpu|cuda] [--seconds 840] [--large]
"""

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.options import parse, parser
from benchmarks.processes import run_within
from benchmarks.progress import Deadline, say
from benchmarks.results import append, record

_DEFAULT_SECONDS = {("cpu", False): 840.0, ("cpu", True): 170.0, ("cuda", False): 480.0, ("cuda", True): 165.0}
# _GRACE: seconds that a step may overrun to finish its current case. _RESERVE: seconds held back from the total for the
# last step's overrun.
_GRACE, _RESERVE = 20.0, 6.0


@dataclass(frozen=True)
class Step:
    """A benchmark: its module, and its shares of the time on a CPU and on a GPU; a share of 0 leaves it out there."""

    module: str
    kind: Literal["kernel", "job", "quality", "inference"]
    cpu: float
    cuda: float
    always_quick: bool = False
    arguments: tuple[str, ...] = ()


STEPS = (
    # On a GPU the most important steps come first, because the time that a step leaves unused goes to the later ones.
    Step("benchmarks.jobs.whole", "job", 0.0, 0.46),
    Step("benchmarks.kernels.sweep", "kernel", 0.0, 0.13),
    Step("benchmarks.kernels.run", "kernel", 0.28, 0.15),
    Step("benchmarks.jobs.profile", "job", 0.0, 0.10),
    Step("benchmarks.jobs.calibration", "job", 0.39, 0.10),
    Step("benchmarks.jobs.growth", "job", 0.10, 0.03),
    Step("benchmarks.jobs.memory", "job", 0.08, 0.0),
    Step("benchmarks.jobs.overhead", "job", 0.06, 0.0, always_quick=True),
    Step("benchmarks.jobs.score_select_cut", "job", 0.02, 0.0),
    Step("benchmarks.inference.speed", "inference", 0.10, 0.03),
    # The whole table takes hours and has its own command.
    Step("benchmarks.quality.methods", "quality", 0.11, 0.0, always_quick=True),
)
# A model of 70B parameters: whole, if the GPU can hold it, and streamed within the memory of a small GPU.
LARGE = (
    Step("benchmarks.jobs.calibration", "job", 0.4, 0.4, arguments=("--sizes", "70B")),
    Step("benchmarks.jobs.streamed", "job", 0.6, 0.6, arguments=("--num_samples", "8", "--seq_len", "2048")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; return 1 if one of them failed, else 0."""
    made = parser(__doc__)
    made.add_argument("--large", action="store_true", help="run only the jobs of the 70B model")
    made.add_argument("--steps_of", choices=["cpu", "cuda"], help="the device whose steps are run; by default --device")
    options = parse(made, arguments)
    default = _DEFAULT_SECONDS[options.device, options.quick]
    deadline = Deadline(default if options.seconds is None else options.seconds)
    steps = [(step, getattr(step, options.steps_of or options.device)) for step in (LARGE if options.large else STEPS)]
    steps = [(step, share) for step, share in steps if share]
    failed = 0
    while steps:
        # Time that earlier steps did not use is shared among the remaining ones.
        step, share = steps[0]
        seconds = (deadline.left - _RESERVE) * share / sum(other for _, other in steps)
        failed |= not _run(step, seconds, deadline, options)
        steps = steps[1:]
    say(f"done; the results are in {options.output}; python -m benchmarks.report shows them")
    return int(failed)


def _run(step: Step, seconds: float, deadline: Deadline, options: Namespace) -> bool:
    """Run one step, and return whether it succeeded or was skipped."""
    if seconds <= 0.0:
        _record_failure(step, "skipped: the time for this run was used up", options)
        return True
    say(f"{step.module}, {seconds:.0f} s")
    command = [sys.executable, "-m", step.module, "--device", options.device, "--output", str(options.output)]
    command += [
        "--until",
        f"{time.monotonic() + seconds:.1f}",
        *(["--quick"] if options.quick or step.always_quick else []),
        *(["--toy"] if options.toy else []),
        *step.arguments,
    ]
    code = run_within(command, min(seconds + _GRACE, deadline.left))
    if code is None:
        _record_failure(step, f"timeout: not done {_GRACE:.0f} s after its {seconds:.0f} s", options)
    elif code != 0:
        _record_failure(step, f"failed with exit code {code}", options)
    return code == 0


def _record_failure(step: Step, error: str, options: Namespace) -> None:
    say(f"{step.module}: {error}")
    append(record(step.kind, step.module, "all", "", "", options.device, error=error), options.output)


if __name__ == "__main__":
    sys.exit(main())
