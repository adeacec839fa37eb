"""The whole job: `prune` of a random model by its default options, stage by stage, beside calibration alone by others.

    python -m benchmarks.jobs.whole --device cuda [--quick]

First everyone calibrates on a few samples, once, after a batch to warm up: this project with what the default method
needs and with all evidence, the plain pass, and the naive way. Then the model is pruned in place, with repair and both
perplexities, on as many samples as there is time for. One that is too large to be distilled by default is distilled all
the same, as a smaller one would be, but what that takes is no part of the sum. Everyone recomputes activations. Peak
memory is on top of the loaded weights.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
from gradprune.evaluation.size import model_size

NAME, OURS, DISTILLED = "whole", "gradprune by default", "distillation on request"
# A whole job, and the calibration that is its largest part, in seconds per sample: at most so many times as long.
_OF_CALIBRATION = 3.0


@dataclass(frozen=True)
class Job:
    """A model, what everyone calibrates on, and what it is pruned with: at most `samples`, by `batch`."""

    size: str
    dtype: str
    compared: Load
    samples: int
    batch: int
    held_out: int = 32

    def load(self, samples: int) -> Load:
        """What it is pruned with."""
        return Load(samples, self.compared.tokens, self.batch)

    def distilled(self, samples: int) -> int:
        """Of them, those that a small model is distilled on by default."""
        return PruneConfig(num_samples=samples, seq_len=self.compared.tokens).samples_distilled(parameters=0)

    def config(self, samples: int) -> PruneConfig:
        """The options: as by default, but for what saves memory, and for distillation."""
        return PruneConfig(
            num_samples=samples, seq_len=self.compared.tokens, batch_size=self.batch, held_out_samples=self.held_out,
            eval_samples=self.batch, use_gradient_checkpointing=True, in_place=True, measure_speed=False,
            distill_samples=self.distilled(samples),
        )  # fmt: skip


TOY = Job("toy", "fp32", Load(4, 16, 2), samples=8, batch=2, held_out=2)
QUICK = Job("1B", "bf16", Load(4, 512, 4), samples=16, batch=4, held_out=4)
FULL = Job("8B", "bf16", Load(16, 2048, 4), samples=128, batch=8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare calibration, then prune."""
    options = parse(parser(__doc__), arguments)
    logging.set_verbosity_error()
    deadline = Deadline(options.seconds)
    job = TOY if options.toy else QUICK if options.quick else FULL
    say(f"the whole job on the {job.size} Llama, {job.dtype} on {options.device}")
    model = build(job.size, options.device, job.dtype)
    a_sample = _compare(job, model, options)
    samples = _affordable(job, a_sample, deadline)
    if samples:
        _prune(job, model, samples, options)
    else:
        error = f"skipped: {max(deadline.left, 0.0):.0f} s are left, and a sample takes about {a_sample:.1f} s"
        _append(job, job.load(job.samples), OURS, Timing.failed(error), None, options)


def _compare(job: Job, model: LlamaForCausalLM, options: Namespace) -> float:
    """Everyone calibrates; returns our seconds per sample, 0 where that is not known."""
    ours = fastest_backend(options.device)
    everyone = {one.name: one for one in calibrators((ours,))}
    a_sample = 0.0
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
            a_sample = a_sample or turn.seconds / job.compared.samples
        _append(job, job.compared, f"calibration, {name}", timing, peak, options)
    free(options.device)
    return a_sample


def _affordable(job: Job, a_sample: float, deadline: Deadline) -> int:
    """The samples that there is time to prune with: all, a half, a quarter or an eighth of them; 0 for none."""
    counts = (job.samples >> halvings for halvings in range(4))
    fixed = job.held_out + 2 * job.batch
    return next((n for n in counts if n and deadline.allows(a_sample * (_OF_CALIBRATION * n + fixed))), 0)


def _prune(job: Job, model: LlamaForCausalLM, samples: int, options: Namespace) -> None:
    """Prune the model, and record every stage and their sum."""
    load = job.load(samples)
    ids = _tokens(model.config.vocab_size, (samples + job.held_out + job.batch) * load.tokens)
    try:
        with _peaks(options.device) as peaks:
            result = prune(
                model, None, job.config(samples), calibration=ids, evaluation=ids[-job.batch * load.tokens :]
            )
    except Exception as error:  # what goes wrong on a device is recorded as its result
        fault = f"out of memory: {first_line(error)}" if out_of_memory(error) else first_line(error)
        _append(job, load, OURS, Timing.failed(fault), None, options)
        raise
    seconds = dict(result.seconds)
    on_request = PruneConfig().samples_distilled(result.before.parameters) == 0
    distillation = seconds.pop("distillation") if on_request else None
    for stage, taken in seconds.items():
        _append(job, load, f"stage {stage}", Timing.of([taken]), peaks.get(stage), options)
    if distillation is not None:
        _append(job, load, DISTILLED, Timing.of([distillation]), peaks.pop("distillation", None), options)
    _append(job, load, OURS, Timing.of([sum(seconds.values())]), max(peaks.values(), default=None), options)


def _tokens(vocabulary: int, count: int) -> Tensor:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(2))


@contextmanager
def _peaks(device: str) -> Iterator[dict[str, int]]:
    """By stage, the most bytes of tensors on top of those on entry, once it is done; empty on a CPU."""
    peaks: dict[str, int] = {}
    if device != "cuda":
        yield peaks
        return
    held = torch.cuda.memory_allocated()

    def enter(_name: str) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def leave(name: str) -> None:
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - held

    with stages_watched(enter, leave):
        yield peaks


def _append(job: Job, load: Load, provider: str, timing: Timing, peak: int | None, options: Namespace) -> None:
    weights = model_size(build(job.size, "meta", job.dtype)).bytes
    extra = {"samples": load.samples, "weight_bytes": weights}
    made = record(
        "job", NAME, provider, f"Llama {job.size}, {load.text}", job.dtype, options.device, peak_memory=peak,
        extra=extra, **timing.values(),
    )  # fmt: skip
    append(made, options.output)
    memory = "" if peak is None else f"{(peak + weights) / 2**30:8.1f} GiB with the weights"
    say(f"    {provider:40s} {timing.error or f'{timing.p50 / 1e3:9.2f} s'}{memory}")


if __name__ == "__main__":
    main()
