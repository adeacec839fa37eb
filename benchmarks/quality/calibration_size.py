"""Perplexity by the number of calibration samples: this project's default method and FLAP, on the same samples.

    python -m benchmarks.quality.calibration_size [--models stories260k,smollm2-135m] [--sizes 64,128,256,512]
    python -m benchmarks.quality.calibration_size --base_model MODEL --dataset TEXT --eval_dataset TEXT

Ratios are of the prunable parameters. Not part of `make bench`, because SmolLM2-135M takes an hour; --quick measures
two numbers of samples.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence

from benchmarks.options import listed, parse, parser
from benchmarks.progress import Deadline, say
from benchmarks.quality.methods import ProviderChoice, peer_choice, pruned_quality
from benchmarks.quality.peers import taking_part
from benchmarks.quality.pruned import Pruned
from benchmarks.quality.subjects import MODELS, SMOLLM2, Subject, add_model_options, quality_of, subjects, without_tasks
from benchmarks.results import append, percent, record
from gradprune.calibration.gather import gather_evidence
from gradprune.config import PruneConfig
from gradprune.data.samples import draw_samples
from gradprune.models import describe
from gradprune.run import Run
from gradprune.scoring.choose import choose

OURS, PEER = "gradprune prune", "FLAP"
"""OURS is `prune` with its defaults. Records of "gradprune obs + least squares" are older than obs's use of reach."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure model by model, seed by seed, from few samples to many."""
    made = parser(__doc__)
    add_model_options(made)
    made.add_argument("--models", type=listed(str, (*MODELS, SMOLLM2)), default=("stories260k", SMOLLM2))
    made.add_argument("--sizes", type=listed(int), default=None, help="numbers of samples")
    made.add_argument("--ratios", type=listed(float), default=(0.2, 0.5))
    made.add_argument("--seeds", type=listed(int), default=(0,))
    made.add_argument("--seq_len", type=int, default=128)
    made.add_argument("--eval_samples", type=int, default=64, help="windows to measure")
    options = without_tasks(parse(made, arguments))
    options.sizes = options.sizes or ((4, 8) if options.toy else (128, 512) if options.quick else (64, 128, 256, 512))
    deadline = Deadline(options.seconds)
    for subject in subjects(options):
        dense = quality_of(subject.model, subject, options).perplexity
        say(f"samples for {subject.name}: dense perplexity {dense:.2f}")
        for run, choice in _choices(subject, options):
            if not deadline.allows(0.0):
                say("    the time for this run is used up")
                return
            _append(subject, run, choice, dense, options)


def _choices(subject: Subject, options: Namespace) -> Iterator[tuple[Run, ProviderChoice]]:
    view = describe(subject.model)
    peers = list(taking_part([PEER], view))
    for seed in options.seeds:
        for size in options.sizes:
            config = PruneConfig(num_samples=size, seq_len=options.seq_len, seed=seed)
            run = Run(view, config, draw_samples(subject.model, None, config, subject.calibration, subject.evaluation))
            evidence = gather_evidence(run)
            for given in options.ratios:
                ratio = given * view.prunable / view.parameters
                masks = choose(view, evidence, config.scoring, config.constraints, ratio).masks
                yield run, ProviderChoice(OURS, given, Pruned(run, masks).distilled)
                for name in peers:
                    yield run, peer_choice(name, run, given, int(ratio * view.parameters))


def _append(subject: Subject, run: Run, choice: ProviderChoice, dense: float, options: Namespace) -> None:
    measured = pruned_quality(choice, subject, options).perplexity
    size, seed = run.config.num_samples, run.config.seed
    extra = {
        "ratio": choice.ratio,
        "seed": seed,
        "num_samples": size,
        "seq_len": options.seq_len,
        "perplexity": measured,
        "perplexity_dense": dense,
        "eval_windows": options.eval_samples,
    }
    shape = f"{percent(choice.ratio)}, {size} samples"
    made = record("calibration_size", subject.name, choice.provider, shape, "fp32", options.device, extra=extra)
    append(made, options.output)
    say(f"    {shape:18s} seed {seed} {choice.provider:28s} perplexity {measured:8.2f}")


if __name__ == "__main__":
    main()
