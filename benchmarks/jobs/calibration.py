"""Calibration and importance of a whole model: time and peak memory, all providers by turns in one run.

    python -m benchmarks.jobs.calibration [--sizes 3M,28M] [--device cuda] [--quick]

Each provider first scores one batch, which is checked against the reference; then all take turns. Peak memory is what
a provider's tensors need on top of the loaded model: on the CPU it is measured in a separate process, on a GPU by
PyTorch's allocator. `forward` shows how much of it is activations. Jobs in which every provider recomputes activations
leave out `forward` and the providers that differ from others only by recomputation.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor
from transformers.utils import logging

from benchmarks.jobs.calibrators import NEEDED, RECOMPUTING, Calibrator, calibrators, engine_scores
from benchmarks.jobs.models import SIZES, Load, build, samples
from benchmarks.jobs.session import TIMEOUT, Session, Task, Turn, TurnError, Worker
from benchmarks.options import listed, parse, parser
from benchmarks.progress import Deadline, say
from benchmarks.results import append, record
from benchmarks.timing import Timing, free
from gradprune.config import ImportanceBackend
from gradprune.evaluation.size import model_size
from gradprune.models import describe
from gradprune.ops.dispatch import importance_ops_fault

FLOOR, _GROUP_TAYLOR = "plain", "torch-pruning GroupTaylor"


@dataclass(frozen=True)
class Job:
    """A model, a load, and the number of turns per provider.

    recompute: whether every provider recomputes activations. only: the providers that take part, all if empty, unless
        --providers names others.
    seconds: estimated duration; the job is skipped if less time is left. gigabytes: GiB of GPU memory that it requires.
    """

    size: str
    load: Load
    repeats: int
    dtype: str = "fp32"
    recompute: bool = False
    only: tuple[str, ...] = ()
    seconds: float = 20.0
    gigabytes: float = 0.0


_OURS_ON_CPU = ("gradprune cpp", f"gradprune cpp{RECOMPUTING}")
TOY = [Job("toy", Load(4, 16, 2), repeats=2, seconds=0.0)]
QUICK = [Job("3M", Load(4, 128, 4), repeats=3)]
CPU = [
    Job("3M", Load(4, 128, 4), repeats=9),
    Job("28M", Load(4, 128, 4), repeats=7, seconds=60.0),
    # The other providers take a minute per turn.
    Job("110M", Load(4, 128, 4), 3, only=(*_OURS_ON_CPU, "forward", FLOOR, "naive", _GROUP_TAYLOR), seconds=130.0),
]
_OURS_ON_GPU = "gradprune triton"
_TORCH_PRUNING = (_GROUP_TAYLOR, "torch-pruning GroupHessian")
_OTHERS_ON_GPU = (_OURS_ON_GPU, f"{_OURS_ON_GPU}{NEEDED}", "gradprune reference", FLOOR, "naive", "torch.func")
GPU_QUICK = [Job("1B", Load(4, 512, 2), repeats=3, dtype="bf16", recompute=True)]
GPU = [
    Job("8B", Load(4, 2048, 2), 3, "bf16", True, _OTHERS_ON_GPU, seconds=60.0, gigabytes=24.0),
    Job("70B", Load(2, 512, 1), 1, "bf16", True, (_OURS_ON_GPU, FLOOR), seconds=40.0, gigabytes=134.0),
    # Late and separate: Torch-Pruning's tracing may hang, and in-process it cannot be killed without losing the run.
    Job("8B", Load(4, 1024, 2), 2, "bf16", True, (_OURS_ON_GPU, FLOOR, *_TORCH_PRUNING), seconds=60.0, gigabytes=24.0),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the device's jobs, or only those of the given model sizes."""
    made = parser(__doc__)
    made.add_argument("--sizes", type=listed(str, SIZES), default=None, help="run only the jobs of these model sizes")
    made.add_argument(
        "--providers", type=listed(str), default=None, help="who takes part, instead of each job's own choice"
    )
    options = parse(made, arguments)
    logging.set_verbosity_error()
    deadline = Deadline(options.seconds)
    for job in _jobs(options):
        _benchmark(job, deadline, options)


def _jobs(options: Namespace) -> list[Job]:
    if options.toy:
        return TOY
    full, quick = (GPU, GPU_QUICK) if options.device == "cuda" else (CPU, QUICK)
    jobs = quick if options.quick else full
    return [job for job in jobs if options.sizes is None or job.size in options.sizes]


def _benchmark(job: Job, deadline: Deadline, options: Namespace) -> None:
    say(f"calibration of the {job.size} Llama, {job.load.text}, {job.dtype} on {options.device}")
    fault = _obstacle(job, deadline, options.device)
    if fault is not None:
        say(f"    {fault}")
        append(record("job", "calibration", "all", _shape(job), job.dtype, options.device, error=fault), options.output)
        return
    free(options.device)
    everyone = [one for one in calibrators(backends(options.device)) if _takes_part(one, job, options)]
    with _sessions(job, everyone, options.device) as sessions:
        errors = _check(job, everyone, sessions, deadline, options.device)
        turns = _alternate(job, sessions, errors, deadline)
    held = {name: _held_memory(job, name, of_one, deadline, options.device) for name, of_one in turns.items()}
    _record(job, everyone, turns, held, errors, options)


def _obstacle(job: Job, deadline: Deadline, device: str) -> str | None:
    if not deadline.allows(job.seconds):
        return f"skipped: about {job.seconds:.0f} s are needed, {max(deadline.left, 0.0):.0f} s are left"
    if device == "cuda":
        gigabytes = torch.cuda.get_device_properties(0).total_memory / 2**30
        if gigabytes < job.gigabytes:
            return f"skipped: about {job.gigabytes:.0f} GiB of GPU memory are needed, there are {gigabytes:.0f}"
    return None


def _takes_part(one: Calibrator, job: Job, options: Namespace) -> bool:
    if job.recompute and (one.name == "forward" or one.name.endswith(RECOMPUTING)):
        return False
    chosen = options.providers or job.only
    return not chosen or one.name in chosen


def backends(device: str) -> tuple[str, ...]:
    """Return this project's backends that run on the device; not Triton on a CPU, where only its interpreter runs."""
    return tuple(
        backend
        for backend in get_args(ImportanceBackend)
        if backend != "auto"
        and not (backend == "triton" and device == "cpu")
        and importance_ops_fault(backend, device) is None
    )


def fastest_backend(device: str) -> str:
    """Return the backend that a run on the device should use: the first available of triton, cpp and reference."""
    return next(backend for backend in ("triton", "cpp", "reference") if backend in backends(device))


@contextmanager
def _sessions(job: Job, everyone: Sequence[Calibrator], device: str) -> Iterator[dict[str, Session | Worker]]:
    """Yield sessions by name: each in its own process on the CPU; on a GPU all in this process, sharing one model."""
    sessions: dict[str, Session | Worker] = {}
    try:
        model = build(job.size, device, job.dtype) if device == "cuda" else None
        for one in everyone:
            sessions[one.name] = Worker(_task(job, one.name)) if model is None else Session(one, model, job.recompute)
        yield sessions
    finally:
        for session in sessions.values():
            session.close()


def _task(job: Job, provider: str) -> Task:
    return Task(provider, backends("cpu"), job.size, job.dtype, job.recompute, torch.get_num_threads())


def _check(
    job: Job,
    everyone: Sequence[Calibrator],
    sessions: dict[str, Session | Worker],
    deadline: Deadline,
    device: str,
) -> dict[str, str]:
    """Return what is wrong with each provider that failed or gave wrong scores; these providers are not timed."""
    expected = None if job.gigabytes > 100.0 else _expected(job, device)
    errors = {}
    for one in everyone:
        try:
            found = sessions[one.name].scores(job.load, _timeout(deadline))
        except TurnError as error:
            errors[one.name] = str(error)
        else:
            fault = None if expected is None or one.reduction is None else _fault(found, expected[one.reduction], job)
            if fault is not None:
                errors[one.name] = f"wrong result: {fault}"
        say(f"    {one.name}: {errors.get(one.name, 'right, or nothing to check')}")
    return errors


def _expected(job: Job, device: str) -> dict[str, dict[str, Tensor]]:
    """The reference's scores of the first batch, by `Calibrator.reduction`."""
    model = build(job.size, device, job.dtype)
    batch = samples(model, job.load)[:1]
    by_sample, by_batch = (
        engine_scores(model, batch, "reference", reduction, job.recompute) for reduction in ("sample", "batch")
    )
    sizes = [(block.kind.name, block.groups) for block in describe(model).blocks]
    parts = zip(sizes, by_batch["taylor"].split([groups for _, groups in sizes]), strict=True)
    # Torch-Pruning divides the scores of a layer's channels by their mean.
    channels = [part / part.mean() for (kind, _), part in parts if kind == "mlp"]
    return {"sample": by_sample, "batch": by_batch, "mlp": {"taylor": torch.cat(channels)}}


def _fault(found: dict[str, Tensor], expected: dict[str, Tensor], job: Job) -> str | None:
    """Return what is wrong with scores or None, by relative error in the 2-norm; bf16 has a wider tolerance."""
    allowed = 1e-3 if job.dtype == "fp32" else 5e-2
    for method, have in found.items():
        want = expected[method]
        if have.shape != want.shape:
            return f"{method} has {len(have)} scores, not {len(want)}"
        error = float((have.double() - want.double()).norm() / want.double().norm())
        # "not <=" rather than ">", so that NaN fails.
        if not error <= allowed:
            return f"{method} differs from the reference by {error:.1e}; {allowed:.1e} is allowed"
    return None if found else "there are no scores"


def _alternate(
    job: Job, sessions: dict[str, Session | Worker], errors: dict[str, str], deadline: Deadline
) -> dict[str, list[Turn]]:
    """Take turns, and return them by provider. One that fails has no further turn; its error is added to `errors`."""
    turns: dict[str, list[Turn]] = {name: [] for name in sessions}
    for repeat in range(job.repeats):
        # A repeat takes about as long as the one before.
        last = sum(of_one[-1].seconds for of_one in turns.values() if of_one)
        if repeat and not deadline.allows(last):
            say(f"    {repeat} of {job.repeats} repeats; the time for this run is used up")
            break
        for name, session in sessions.items():
            if name in errors:
                continue
            try:
                turns[name].append(session.turn(job.load, _timeout(deadline)))
            except TurnError as error:
                errors[name] = str(error)
    return turns


def _held_memory(job: Job, name: str, turns: Sequence[Turn], deadline: Deadline, device: str) -> int | None:
    """Peak bytes of a provider's tensors; None without a turn, or if the CPU's extra turn fails or has no time left."""
    if not turns or device != "cpu":
        return max((turn.peak_memory for turn in turns), default=None)
    # The new process builds the model first, and its memory mappings make it slower than the turns before.
    if not deadline.allows(3.0 * turns[-1].seconds):
        return None
    worker = Worker(replace(_task(job, name), mapped=True))
    try:
        return worker.turn(job.load, _timeout(deadline)).peak_memory
    except TurnError:
        return None
    finally:
        worker.close()


def _timeout(deadline: Deadline) -> float:
    """The time limit of one turn, in seconds.

    Raises:
        TurnError: no time is left.
    """
    if not deadline.allows(0.0):
        raise TurnError("skipped: the time for this run was used up")
    return min(TIMEOUT, deadline.left)


def _record(
    job: Job,
    everyone: Sequence[Calibrator],
    turns: dict[str, list[Turn]],
    held: dict[str, int | None],
    errors: dict[str, str],
    options: Namespace,
) -> None:
    timings = {
        one.name: Timing.failed(errors[one.name])
        if one.name in errors
        else Timing.of([turn.seconds for turn in turns[one.name]])
        for one in everyone
    }
    floor = timings[FLOOR].p50 if FLOOR in timings else None
    weights = model_size(build(job.size, "meta", job.dtype)).bytes
    for one in everyone:
        timing, of_one, peak = timings[one.name], turns[one.name], held[one.name]
        made = record(
            "job",
            "calibration",
            one.name,
            _shape(job),
            job.dtype,
            options.device,
            percent_of_floor=None if floor is None or timing.p50 is None else 100.0 * floor / timing.p50,
            peak_memory=peak,
            extra={
                "peak_resident": max((turn.peak_memory for turn in of_one), default=None),
                "samples": job.load.samples,
                "tokens": job.load.tokens,
                "batch": job.load.batch,
                "recompute": job.recompute,
                "attention": one.attention,
                "weight_bytes": weights,
                **{f"{part}_ms": 1e3 * of_one[-1].parts[part] for part in (of_one[-1].parts if of_one else ())},
            },
            **timing.values(),
        )
        append(made, options.output)
        shown = f"{timing.p50:10.1f} ms {peak / 2**20:9.1f} MiB" if timing.p50 and peak is not None else timing.error
        say(f"    {one.name:28s} {shown}")


def _shape(job: Job) -> str:
    return f"Llama {job.size}, {job.load.text}"


if __name__ == "__main__":
    main()
