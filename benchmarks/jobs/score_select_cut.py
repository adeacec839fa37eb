"""From the end of calibration to a cut model: time of scoring, selecting and cutting, by number of layers.

    python -m benchmarks.jobs.score_select_cut [--layers 4,8,16,32] [--quick]

The model is a randomly initialised Llama: hidden 512, 8 heads, intermediate 1408, vocabulary 4096.
"""

import time
from collections.abc import Sequence

from transformers import LlamaForCausalLM

from benchmarks.jobs.models import Load, build, samples
from benchmarks.options import listed, parse, parser
from benchmarks.progress import Deadline, say
from benchmarks.results import append, record
from benchmarks.timing import Timing
from gradprune.calibration.engine import ImportanceEngine
from gradprune.config import Constraints, Scoring
from gradprune.evaluation.size import model_size
from gradprune.models import describe
from gradprune.scoring.choose import score_groups
from gradprune.scoring.selection import select
from gradprune.surgery.cut import cut

STEPS = ("score", "select", "cut")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each depth: one record per step, and one for all steps together."""
    made = parser(__doc__)
    made.add_argument("--layers", type=listed(int), default=None)
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--pruning_ratio", type=float, default=0.2)
    options = parse(made, arguments)
    deadline = Deadline(options.seconds)
    size = "toy" if options.toy else "28M"
    for layers in options.layers or ([2] if options.toy else [4, 8] if options.quick else [4, 8, 16, 32]):
        if not deadline.allows(0.0):
            say("score_select_cut: the time for this run is used up")
            return
        model = build(size, options.device, layers=layers)
        engine = calibrated(model)
        runs = [job(model, engine, options.pruning_ratio) for _ in range(options.repeats)]
        parameters = model_size(model).parameters
        for step, seconds in zip((*STEPS, "all"), zip(*(((*run, sum(run))) for run in runs), strict=True), strict=True):
            timing = Timing.of(seconds)
            extra = {"layers": layers, "parameters": parameters, "step": step}
            found = record(
                "job",
                "score, select, cut",
                f"gradprune {step}",
                f"Llama {size}, {layers} layers",
                "fp32",
                options.device,
                extra=extra,
                **timing.values(),
            )
            append(found, options.output)
            say(f"score_select_cut, {layers} layers, {parameters / 1e6:.1f} M parameters: {step} {timing.p50:.1f} ms")


def calibrated(model: LlamaForCausalLM) -> ImportanceEngine:
    """Return an engine that has calibrated on one batch."""
    with ImportanceEngine(model, "taylor_2nd") as engine:
        engine.step(samples(model, Load(2, 64, 2))[0])
    return engine


def job(model: LlamaForCausalLM, engine: ImportanceEngine, ratio: float) -> tuple[float, float, float]:
    """Score, select and cut, and return the seconds of each; the cut model shares the tensors that are not cut."""
    start = time.perf_counter()
    view = describe(model)
    table = score_groups(view, engine.evidence(method=engine.method), Scoring(importance_method=engine.method))
    scored = time.perf_counter()
    masks = table.masks(select(table, ratio, view.parameters, Constraints()))
    selected = time.perf_counter()
    cut(model, masks)
    return scored - start, selected - scored, time.perf_counter() - selected


if __name__ == "__main__":
    main()
