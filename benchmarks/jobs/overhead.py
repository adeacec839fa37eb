"""The cost of streaming a model that would fit: calibration with streamed layers against the whole model.

    python -m benchmarks.jobs.overhead [--base_model smollm2-135m] [--quick]

Both recompute each layer's activations in the backward pass, on the same samples, by turns in one process on one
thread. Other work on the machine slows both alike, so only the ratio of their processor times is recorded: in each turn
the two run one right after the other, and the median over the turns is taken. The model is an fp32 checkpoint that has
just been written, so its pages are in the file cache.
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.jobs.models import Load, build, samples
from benchmarks.options import parse, parser
from benchmarks.progress import Deadline, say
from benchmarks.results import append, record
from gradprune.calibration.engine import ImportanceEngine
from gradprune.checkpoint.load import load_model
from gradprune.config import Method

METHODS: tuple[Method, ...] = ("group_fisher", "taylor")
LOADS = (Load(4, 128, 4), Load(16, 128, 4))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each case, and print its ratio."""
    made = parser(__doc__)
    made.add_argument("--base_model", default="smollm2-135m", help="a checkpoint, or a model that a package contains")
    made.add_argument("--turns", type=int, default=5, help="number of turns")
    options = parse(made, arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    deadline = Deadline(options.seconds)
    name = "Llama toy" if options.toy else options.base_model
    model = build("toy") if options.toy else load_model(options.base_model)[0].float()
    loads = (Load(2, 8, 1),) if options.toy else LOADS[: 1 if options.quick else None]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        whole, streamed = load_model(folder)[0], load_model(folder, stream_layers="on")[0]
        for load in loads:
            for method in METHODS:
                case = f"{name}, {load.text}, {method}"
                if not deadline.allows(60.0 if not options.toy else 0.0):
                    say(f"    {case}: the time for this run is used up")
                    continue
                _append(case, _ratios(whole, streamed, method, load, options.turns), options)
    torch.set_num_threads(threads)


def _ratios(whole: PreTrainedModel, streamed: PreTrainedModel, method: Method, load: Load, turns: int) -> list[float]:
    """The streamed calibration's processor time relative to the whole model's, turn by turn."""
    batches = samples(whole, load)
    for model in (whole, streamed):
        _seconds(model, method, batches[:1])
    # The second of the two may find a busier machine, so each goes first in half of the turns.
    found = []
    for turn in range(turns):
        pair = [_seconds(model, method, batches) for model in ((whole, streamed) if turn % 2 else (streamed, whole))]
        found.append(pair[1] / pair[0] if turn % 2 else pair[0] / pair[1])
    return found


def _seconds(model: PreTrainedModel, method: Method, batches: Sequence[Tensor]) -> float:
    """Processor time of a calibration."""
    start = time.process_time()
    engine = ImportanceEngine(model, method, use_gradient_checkpointing=True, weight_gradient_steps=0)
    with engine:
        for wave in engine.waves(batches):
            engine.steps(wave)
    engine.scores()
    return time.process_time() - start


def _append(case: str, ratios: Sequence[float], options: Namespace) -> None:
    extra = {"ratio": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    append(
        record(
            "job", "overhead of streaming", "streamed / recomputing", case, "fp32", options.device,
            repeats=len(ratios), extra=extra,
        ),
        options.output,
    )  # fmt: skip
    say(f"    {case}: {extra['ratio']:.3f} x the processor time ({extra['lowest']:.3f} to {extra['highest']:.3f})")


if __name__ == "__main__":
    main()
