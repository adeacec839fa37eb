"""Compare the memory that `gradprune plan` predicts with the peak of a run, and measure how time and memory grow.

    python -m benchmarks.jobs.memory [--quick] [--axes layers,samples]

Each case is `prune` by `obs` on random weights, with the model whole, whole with recomputed activations, or streamed.
It runs in a process of its own, or in several that share the work. What is recorded of each stage is the peak of
resident memory without the file cache (RssAnon, Linux only), sampled every millisecond, on top of what the process held
before the model was loaded; of several processes, the largest. Every larger tensor has a memory mapping of its own, so
that freed memory leaves the process immediately.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks.jobs.growth import exponent
from benchmarks.jobs.stages import stages_watched
from benchmarks.options import listed, parse, parser
from benchmarks.processes import memory_of
from benchmarks.progress import Deadline, say
from benchmarks.results import Record, append, record
from gradprune import PruneConfig, prune
from gradprune.checkpoint.load import load_model
from gradprune.models.footprint import Footprint, footprint
from gradprune.models.sizes import model_shape
from gradprune.ranks import current, launched

# Gives larger allocations their own mappings, as `Task.mapped` of `benchmarks.jobs.session` does, by the environment.
_MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)}
_TIMEOUT = 300.0
MODES = ("whole", "recomputing", "streamed")
# The stages of a run, and for each the stage of the plan that holds the same.
STAGES = {
    "calibration": "calibration",
    "importance": "importance",
    "repair": "repair",
    "perplexity_before": "evaluation",
}


@dataclass(frozen=True)
class Case:
    """A run: the model's shape, the samples, and how the model is in memory.

    experts: number of experts in each layer, of which every token is routed to two; 0 for plain MLPs.
    """

    mode: str = "whole"
    hidden: int = 512
    intermediate: int = 1536
    experts: int = 0
    layers: int = 4
    vocabulary: int = 8192
    dtype: str = "float32"
    samples: int = 8
    tokens: int = 256
    batch: int = 4
    ranks: int = 1
    stream_memory: str = "4GiB"

    @property
    def text(self) -> str:
        """The name of the case in results."""
        several = f", {self.ranks} ranks" if self.ranks > 1 else ""
        experts = f"{self.experts} experts of " if self.experts else ""
        return (
            f"{self.mode}: {self.layers} layers of {self.hidden} and {experts}{self.intermediate}, "
            f"vocabulary {self.vocabulary}, {self.samples}x{self.tokens} tokens by {self.batch}{several}"
        )

    def config(self) -> PruneConfig:
        """The options of the run."""
        return PruneConfig(
            importance_method="obs",
            num_samples=self.samples,
            held_out_samples=self.batch,
            seq_len=self.tokens,
            batch_size=self.batch,
            eval_samples=self.batch,
            use_gradient_checkpointing=self.mode != "whole",
            measure_speed=False,
            generations=False,
            in_place=True,
            device="cpu",
            stream_memory=self.stream_memory,
        )

    def model(self) -> PreTrainedModel:
        """The model, with random weights."""
        sizes: dict[str, Any] = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 128,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
        }
        torch.manual_seed(0)
        if self.experts:
            model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=self.experts, num_experts_per_tok=2))
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        return model.to(getattr(torch, self.dtype)).eval()

    def predicted(self) -> Footprint:
        """The plan's prediction for the case."""
        with torch.device("meta"):
            shape = model_shape(self.model())
        return footprint(shape, self.config(), streamed=self.mode == "streamed", world=self.ranks)


# Shapes where weights, activations, Gram matrices or logits outweigh the rest; the plan's constants were set on them.
SHAPES = (
    Case(),
    Case(hidden=1024, intermediate=4096, layers=2, tokens=128),
    Case(hidden=512, intermediate=1408, layers=8, dtype="bfloat16", samples=4, tokens=128),
    Case(hidden=512, intermediate=768, experts=4, layers=3),
)
# A shape that the plan's constants were not set on.
HELD_OUT = Case(hidden=768, intermediate=2304, layers=6, vocabulary=16384, samples=6, tokens=192, batch=3)
AXES = {"layers": (4, 8, 16), "tokens": (256, 512, 1024), "samples": (4, 8, 16), "ranks": (1, 2, 4)}


def cases(quick: bool, toy: bool) -> Iterator[tuple[str, Case]]:
    """Yield each case with the axis that it belongs to, "" for none."""
    if toy:
        tiny = Case(hidden=128, intermediate=192, layers=2, vocabulary=128, samples=2, tokens=16, batch=1)
        yield from (("", replace(tiny, mode=mode)) for mode in MODES)
        return
    shapes = SHAPES[:1] if quick else (*SHAPES, HELD_OUT)
    yield from (("", replace(shape, mode=mode)) for shape in shapes for mode in MODES)
    if quick:
        return
    # The limit fits the streams of one sample in 16 layers, or of four samples in 4 layers.
    at = Case(mode="streamed", samples=4, batch=1, stream_memory="10MiB")
    for axis, values in AXES.items():
        for mode in ("recomputing", "streamed"):
            yield from ((axis, replace(at, mode=mode, **{axis: value})) for value in values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each case, and print prediction, measurement and the fitted exponents."""
    made = parser(__doc__)
    made.add_argument(
        "--axes", type=listed(str, AXES), help=f"measure only these of {', '.join(AXES)}, and no other cases"
    )
    made.add_argument(
        "--case", type=json.loads, help="fields of a case as JSON: measure it in this process (used internally)"
    )
    options = parse(made, arguments)
    if options.case is not None:
        print(json.dumps(measured(Case(**options.case))))
        return
    deadline = Deadline(options.seconds)
    found: list[Record] = []
    chosen = [(axis, case) for axis, case in cases(options.quick, options.toy) if axis in (options.axes or [axis])]
    for axis, case in chosen:
        if not deadline.allows(20.0):
            say("    the time for this run is used up")
            break
        found += _appended(axis, case, in_process(case), options)
    for axis, stage, mode, of_time, of_memory in exponents(found):
        say(f"    {mode}: {stage}'s processor time ~ {axis}^{of_time:.2f}, memory ~ ^{of_memory:.2f}")


def exponents(records: Sequence[Record]) -> Iterator[tuple[str, str, str, float, float]]:
    """Yield (axis, stage, provider, exponent of processor time, exponent of peak memory), leaving out evaluation."""
    series: dict[tuple[str, str, str], list[tuple[int, float, float]]] = {}
    for found in records:
        axis, stage = found.extra["axis"], found.extra["stage"]
        if axis and stage != "evaluation" and found.peak_memory is not None:
            point = found.extra["x"], found.extra["cpu_seconds"], found.peak_memory
            series.setdefault((axis, stage, found.provider), []).append(point)
    for (axis, stage, provider), points in series.items():
        x, seconds, peaks = zip(*sorted(points), strict=True)
        yield axis, stage, provider, exponent(x, seconds), exponent(x, peaks)


def in_process(case: Case) -> dict[str, Any] | None:
    """Run `measured` in a fresh process per rank, and return the maxima over the processes; None if one fails."""
    command = [sys.executable, "-m", "benchmarks.jobs.memory", "--case", json.dumps(asdict(case))]
    started = [
        subprocess.Popen(
            command, env={**os.environ, **_MAPPED, **place}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for place in _places(case.ranks)
    ]
    try:
        outputs = [process.communicate(timeout=_TIMEOUT) for process in started]
    except subprocess.TimeoutExpired as error:
        say(f"    {case.text}: {error}")
        return None
    finally:
        for process in started:
            process.kill()
    failed = [errors.splitlines() for process, (_, errors) in zip(started, outputs, strict=True) if process.returncode]
    if failed:
        say(f"    {case.text}: {(failed[0] or ['it failed'])[-1]}")
        return None
    found = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    return {
        what: {stage: max(each[what][stage] for each in found) for stage in of_first}
        for what, of_first in found[0].items()
    }


def _places(ranks: int) -> list[dict[str, str]]:
    """Environment variables for each of the processes, as a launcher would set them."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def measured(case: Case) -> dict[str, Any]:
    """Run a case, and return the peak bytes ("stages") and seconds of processor time ("seconds") of each stage."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(case.vocabulary, ((case.samples + 2 * case.batch) * case.tokens,), generator=generator)

    def run(this: Case, folder: Path) -> None:
        model, _ = load_model(
            folder, stream_layers="on" if this.mode == "streamed" else "off", stream_memory=this.stream_memory
        )
        own = text % this.vocabulary
        evaluation = own[: this.batch * this.tokens]
        prune(model, None, this.config(), calibration=own, evaluation=evaluation, ranks=current())

    with tempfile.TemporaryDirectory() as place:
        small = replace(case, hidden=128, intermediate=128, layers=1, vocabulary=128, samples=1, tokens=8, batch=1)
        for name, each in (("small", small), ("model", case)):
            each.model().save_pretrained(Path(place, name))
        # The ranks meet only now, because transformers would save the models on the first rank only.
        with launched():
            # A small run first, so that what is imported or allocated only once is not measured.
            run(small, Path(place, "small"))
            with _peaks() as found:
                run(case, Path(place, "model"))
    return found


@contextmanager
def _peaks() -> Iterator[dict[str, Any]]:
    """Yield peak bytes on top of those held on entry, and seconds of processor time, by stage; filled by the body."""
    before, current = _resident(), [""]
    peaks: dict[str, int] = {}
    seconds: dict[str, float] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            name = current[0]
            held = _resident() - before
            # A sample during which the stage changed is dropped, because it may belong to either stage.
            if name == current[0]:
                peaks[name] = max(peaks.get(name, 0), held)
            time.sleep(0.001)

    start = 0.0

    def enter(name: str) -> None:
        nonlocal start
        start, current[0] = time.process_time(), name

    def leave(name: str) -> None:
        # Every stage is sampled at least once, however short it was.
        peaks[name] = max(peaks.get(name, 0), _resident() - before)
        seconds[name], current[0] = time.process_time() - start, ""

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with stages_watched(enter, leave):
            yield {"stages": peaks, "seconds": seconds}
    finally:
        done.set()
        watcher.join()


def _resident() -> int:
    """Bytes of resident memory of this process without the file cache."""
    held = memory_of("RssAnon")
    assert held is not None, "only Linux reports memory without the file cache"
    return held


def _appended(axis: str, case: Case, found: dict[str, Any] | None, options: Namespace) -> Iterator[Record]:
    """Write a record of each stage, and yield it."""
    predicted = {stage.name: stage.host + stage.device for stage in case.predicted().stages}
    # The same case may be a point on several axes, so the axis is part of the shape.
    shape = f"{case.text}, growing {axis}" if axis else case.text
    for running, planned in STAGES.items():
        peak = None if found is None else found["stages"].get(running)
        seconds = None if found is None else found["seconds"].get(running)
        extra = {"axis": axis, "x": getattr(case, axis) if axis else None, "cpu_seconds": seconds}
        extra |= {"stage": planned, "predicted": predicted[planned]}
        error = None if peak is not None else "it could not run"
        made = record(
            "job", f"memory with {planned}", f"gradprune {case.mode}", shape, case.dtype, options.device,
            peak_memory=peak, error=error, extra=extra,
        )  # fmt: skip
        append(made, options.output)
        yield made
        if peak is not None:
            # No ratio is shown: a tiny run may find all the memory it needs in what the process held before.
            say(f"    {case.text}, {planned}: {peak / 2**20:.0f} MiB, predicted {predicted[planned] / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
