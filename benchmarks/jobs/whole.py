"""The whole job: `prune` of a random model with default options, stage by stage, compared with calibration by others.

    python -m benchmarks.jobs.whole --device cuda [--quick]

First every provider calibrates once on a few samples, after a batch to warm up: this project with only what the default
method needs and with all evidence, the plain pass, and the naive way. Then the model is pruned in place, with repair
and with perplexity before and after, on as many samples as there is time for. A model that is too large to be distilled
by default is distilled nevertheless, as a smaller one would be, but the sum over stages does not include that. Every
provider recomputes activations. Peak memory is on top of the loaded weights.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.utils import logging

from benchmarks.jobs.calibration import fastest_backend
from benchmarks.jobs.calibrators import NEEDED, calibrators
from benchmarks.jobs.models import Load, build
from benchmarks.jobs.session import Session, TurnError
from benchmarks.jobs.stages import stages_watched
from benchmarks.options import parse, parser
from benchmarks.progress import Deadline, say
from benchmarks.results import append, record
from benchmarks.timing import Timing, first_line, free, out_of_memory
from gradprune import PruneConfig, prune
from gradprune.config import CURVATURE_SAMPLES
from gradprune.evaluation.size import model_size

NAME, OURS, DISTILLED = "whole", "gradprune by default", "distillation on request"
# Time per sample of what needs no backward pass, the importances and the repair, in units of a sample's calibration.
_FORWARD_COST = 1.5


@dataclass(frozen=True)
class Job:
    """A model, the load that calibrations are compared on, and what the model is pruned with.

    samples: calibration samples of pruning, at most. batch: their batch size. held_out: held-out samples.
    fixed: seconds that pruning takes regardless of the number of samples.
    """

    size: str
    dtype: str
    compared: Load
    samples: int
    batch: int
    fixed: float
    held_out: int = 32

    def load(self, samples: int) -> Load:
        """The load of pruning with the given number of samples."""
        return Load(samples, self.compared.tokens, self.batch)

    def distilled(self, samples: int) -> int:
        """How many of the samples a small model is distilled on by default."""
        return PruneConfig(num_samples=samples, seq_len=self.compared.tokens).samples_distilled(parameters=0)

    def config(self, samples: int) -> PruneConfig:
        """The options: the defaults, except for sizes, for what saves memory or time, and for distillation."""
        return PruneConfig(
            num_samples=samples, seq_len=self.compared.tokens, batch_size=self.batch, held_out_samples=self.held_out,
            eval_samples=self.batch, use_gradient_checkpointing=True, in_place=True, measure_speed=False,
            distill_samples=self.distilled(samples),
        )  # fmt: skip


TOY = Job("toy", "fp32", Load(4, 16, 2), samples=8, batch=2, fixed=0.0, held_out=2)
QUICK = Job("1B", "bf16", Load(4, 512, 4), samples=16, batch=4, fixed=5.0, held_out=4)
# Of the fixed seconds, an H200 is predicted to need 14 for removal paths, 5 for distillation, and most of the rest for
# solves in fp64.
FULL = Job("8B", "bf16", Load(16, 2048, 4), samples=128, batch=8, fixed=40.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare calibration, then prune."""
    options = parse(parser(__doc__), arguments)
    logging.set_verbosity_error()
    deadline = Deadline(options.seconds)
    job = TOY if options.toy else QUICK if options.quick else FULL
    say(f"the whole job on the {job.size} Llama, {job.dtype} on {options.device}")
    model = build(job.size, options.device, job.dtype)
    seconds_per_sample = _compare(job, model, options)
    samples = _affordable(job, seconds_per_sample, deadline)
    if samples:
        _prune(job, model, samples, options)
    else:
        left = f"{max(deadline.left, 0.0):.0f} s are left"
        error = f"skipped: {left}, and it takes {job.fixed:.0f} s and more than {seconds_per_sample:.1f} s a sample"
        _append(job, job.load(job.samples), OURS, Timing.failed(error), None, options)


def _compare(job: Job, model: LlamaForCausalLM, options: Namespace) -> float:
    """Calibrate with every provider; return the seconds per sample of the first that succeeds, 0 if none does."""
    ours = fastest_backend(options.device)
    everyone = {one.name: one for one in calibrators((ours,))}
    seconds_per_sample = 0.0
    for name in (f"gradprune {ours}{NEEDED}", f"gradprune {ours}", "plain", "naive"):
        session, peak = Session(everyone[name], model, recompute=True), None
        try:
            session.scores(job.compared)
            turn = session.turn(job.compared)
        except TurnError as error:
            timing = Timing.failed(str(error))
        else:
            # On a CPU the peak would be that of the process.
            timing, peak = Timing.of([turn.seconds]), turn.peak_memory if options.device == "cuda" else None
            seconds_per_sample = seconds_per_sample or turn.seconds / job.compared.samples
        _append(job, job.compared, f"calibration, {name}", timing, peak, options)
    free(options.device)
    return seconds_per_sample


def _affordable(job: Job, seconds_per_sample: float, deadline: Deadline) -> int:
    """Return how many samples there is time to prune with: all of the job's, 1/2, 1/4 or 1/8; 0 if not even that."""

    def seconds(samples: int) -> float:
        # Only the first CURVATURE_SAMPLES are calibrated on.
        return job.fixed + seconds_per_sample * (_FORWARD_COST * samples + min(samples, CURVATURE_SAMPLES))

    counts = (job.samples >> halvings for halvings in range(4))
    return next((n for n in counts if n and deadline.allows(seconds(n))), 0)


def _prune(job: Job, model: LlamaForCausalLM, samples: int, options: Namespace) -> None:
    """Prune the model; record every stage as it ends, because a later one may be killed, and then their sum."""
    load = job.load(samples)
    ids = _tokens(model.config.vocab_size, (samples + job.held_out + job.batch) * load.tokens)
    on_request = PruneConfig().samples_distilled(model_size(model).parameters) == 0
    summed: list[Stage] = []

    def ended(stage: Stage) -> None:
        left_out = on_request and stage.name == "distillation"
        if not left_out:
            summed.append(stage)
        provider = DISTILLED if left_out else f"stage {stage.name}"
        _append(job, load, provider, Timing.of([stage.seconds]), stage.peak, options)

    try:
        with _stages_measured(options.device, ended):
            prune(model, None, job.config(samples), calibration=ids, evaluation=ids[-job.batch * load.tokens :])
    except Exception as error:  # what goes wrong on a device is recorded as its result
        fault = f"out of memory: {first_line(error)}" if out_of_memory(error) else first_line(error)
        _append(job, load, OURS, Timing.failed(fault), None, options)
        raise
    peaks = [stage.peak for stage in summed if stage.peak is not None]
    total = sum(stage.seconds for stage in summed)
    _append(job, load, OURS, Timing.of([total]), max(peaks, default=None), options)


def _tokens(vocabulary: int, count: int) -> Tensor:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Stage:
    """A stage that has ended; peak: peak bytes of tensors on top of those held before all stages, None on a CPU."""

    name: str
    seconds: float
    peak: int | None


@contextmanager
def _stages_measured(device: str, ended: Callable[[Stage], object]) -> Iterator[None]:
    """While active, `ended` is called with every stage of a run as it ends."""
    cuda, start = device == "cuda", 0.0
    held = torch.cuda.memory_allocated() if cuda else 0

    def enter(_name: str) -> None:
        nonlocal start
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()

    def leave(name: str) -> None:
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        ended(Stage(name, seconds, torch.cuda.max_memory_allocated() - held if cuda else None))

    with stages_watched(enter, leave):
        yield


def _append(job: Job, load: Load, provider: str, timing: Timing, peak: int | None, options: Namespace) -> None:
    weights = _weight_bytes(job.size, job.dtype)
    extra = {"samples": load.samples, "weight_bytes": weights}
    made = record(
        "job", NAME, provider, f"Llama {job.size}, {load.text}", job.dtype, options.device, peak_memory=peak,
        extra=extra, **timing.values(),
    )  # fmt: skip
    append(made, options.output)
    memory = "" if peak is None else f"{(peak + weights) / 2**30:8.1f} GiB with the weights"
    say(f"    {provider:40s} {timing.error or f'{timing.p50 / 1e3:9.2f} s'}{memory}")


@cache
def _weight_bytes(size: str, dtype: str) -> int:
    return model_size(build(size, "meta", dtype)).bytes


if __name__ == "__main__":
    main()
