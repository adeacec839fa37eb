"""Where a step's time goes: the device's kernels by their total time in one step of the engine.

    python -m benchmarks.jobs.profile --device cuda [--quick]

The model has few layers, so that the profiler's own cost stays small. One step is profiled with all evidence, and one
with only what the default method needs. If Nsight Compute (`ncu`) is installed, it measures one launch of
`linear_importance` in detail, and its report is written to linear-importance-ncu.txt.
"""

import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging

from benchmarks.jobs.calibration import fastest_backend
from benchmarks.jobs.calibrators import NEEDED, Calibrator, calibrators
from benchmarks.jobs.models import Load, build
from benchmarks.jobs.session import Session
from benchmarks.options import parse, parser
from benchmarks.processes import run_within
from benchmarks.progress import Deadline, say
from benchmarks.results import append, record
from benchmarks.timing import Timing

NAME = "profile"
MOST_ROWS = 15
NCU_FILE = "linear-importance-ncu.txt"
# Seconds that Nsight Compute, which runs the kernel dozens of times, may take, and below which it is not started.
_NCU_SECONDS, _NCU_LEAST = 40.0, 10.0
_NCU_SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")
_NCU_PROGRAM = """
import torch
from gradprune.kernels import linear_importance as kernel
x, dy = (torch.randn(4, 2048, 4096, device="cuda").bfloat16() for _ in range(2))
w = torch.randn(4096, 4096, device="cuda").bfloat16()
from_registers = kernel.multiplies_from_registers(w.device)
config = kernel.configs_for(4096, 4096, x.dtype, kernel.descriptors_work(x, dy, w), from_registers)[0]
kernel.linear_importance_triton(x, dy, w, columns=False, config=config)
torch.cuda.synchronize()
"""


@dataclass(frozen=True)
class Job:
    """A model with the widths of `size` and the given number of layers, and the load that a step is taken from."""

    size: str
    layers: int
    load: Load
    dtype: str


TOY = Job("toy", 1, Load(2, 16, 2), "fp32")
QUICK = Job("1B", 2, Load(4, 512, 4), "bf16")
FULL = Job("8B", 4, Load(4, 2048, 4), "bf16")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read one kernel's counters before a model is loaded, then profile a step with each kind of evidence."""
    options = parse(parser(__doc__), arguments)
    logging.set_verbosity_error()
    deadline = Deadline(options.seconds)
    _read_counters(options, deadline)
    job = TOY if options.toy else QUICK if options.quick else FULL
    model = build(job.size, options.device, job.dtype, job.layers)
    ours = fastest_backend(options.device)
    for one in calibrators((ours,)):
        if one.name in (f"gradprune {ours}", f"gradprune {ours}{NEEDED}"):
            _profile(job, one, Session(one, model, recompute=True), options)


def _profile(job: Job, one: Calibrator, session: Session, options: Namespace) -> None:
    """Record the kernels that take most of one step's time, and their share of all kernels' time."""
    cuda = options.device == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    session.scores(job.load)
    with profile(activities=[activity]) as seen:
        session.scores(job.load)
    events = seen.key_averages()
    # Microseconds; on a CPU there are ops instead of kernels.
    times = {event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) for event in events}
    calls = {event.key: event.count for event in events}
    total = sum(times.values())
    shape = f"Llama {job.size} of {job.layers} layers, {job.load.text}"
    say(f"{one.name}, {shape}: {total / 1e3:.1f} ms in {sum(calls.values())} launches")
    for name, microseconds in sorted(times.items(), key=lambda pair: -pair[1])[:MOST_ROWS]:
        share = microseconds / total if total else 0.0
        extra = {"calls": calls[name], "share": share, "step": one.name}
        made = record(
            "job", f"{NAME} of {one.name}", name[:80], shape, job.dtype, options.device, extra=extra,
            **Timing.of([microseconds / 1e6]).values(),
        )  # fmt: skip
        append(made, options.output)
        say(f"    {share:6.1%} {microseconds / 1e3:9.2f} ms {calls[name]:6d} x {name[:80]}")


def _read_counters(options: Namespace, deadline: Deadline) -> None:
    """Write Nsight Compute's report on one launch of the kernel, unless it is missing, not permitted or too slow."""
    ncu = shutil.which("ncu")
    if ncu is None or options.device != "cuda":
        say("LEFT OUT: the kernel's counters, because " + ("there is no GPU" if ncu else "ncu is not installed"))
        return
    if not deadline.allows(_NCU_LEAST):
        say("LEFT OUT: the kernel's counters, because the time for this run was used up")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    # At the regular clocks, because the kernel never runs at those that ncu would fix.
    command = [ncu, "--clock-control", "none", "--kernel-name", "regex:^_linear_importance_kernel"]
    for section in _NCU_SECTIONS:
        command += ["--section", section]
    command += ["--log-file", str(options.output / NCU_FILE), sys.executable, "-c", _NCU_PROGRAM]
    code = run_within(command, min(_NCU_SECONDS, deadline.left))
    if code != 0:
        say(
            f"LEFT OUT: the kernel's counters, because ncu {'took too long' if code is None else f'failed with {code}'}"
        )


if __name__ == "__main__":
    main()
