"""What the text's share in distillation gains on text like the calibration text, and what it costs on other text.

    python -m benchmarks.quality.distilled_text [--shares 0,0.05,0.1,0.2] [--tasks FOLDER --max_questions N]
    python -m benchmarks.quality.distilled_text --own_text 0.5 --shares 0.1 [--tasks FOLDER --max_questions N]
    python -m benchmarks.quality.distilled_text --peers FLAP,Wanda-sp

The text's share is the weight of the next-token loss in distillation. The second command uses samples half of which the
model writes itself; the third measures peers instead. By default the model is SmolLM2-135M, calibrated on WikiText-2,
and the other text is stories; --base_model, --dataset, --eval_dataset and --other_dataset choose different ones. Ratios
are of the prunable parameters. Not part of `make bench`, because SmolLM2-135M takes half an hour; --quick measures one
ratio and two shares.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from benchmarks.options import listed, parse, parser
from benchmarks.progress import say
from benchmarks.quality.peers import PEERS, taking_part
from benchmarks.quality.peers.choice import PeerChoice, applied
from benchmarks.quality.pruned import repaired_copy
from benchmarks.quality.subjects import (
    SMOLLM2,
    STORIES,
    Quality,
    Subject,
    add_model_options,
    add_task_options,
    chosen_subject,
    quality_of,
    without_tasks,
)
from benchmarks.results import append, percent, record
from gradprune.calibration.gather import gather_evidence
from gradprune.config import DISTILL_TEXT, PruneConfig
from gradprune.data.samples import draw_samples
from gradprune.data.sources import load_tokens
from gradprune.errors import CalibrationError
from gradprune.models import describe
from gradprune.run import Run
from gradprune.scoring.choose import choose
from gradprune.surgery.cut import sharing_copy
from gradprune.surgery.distillation import distil_run, taught_samples


class Measured(NamedTuple):
    """A model's quality on text like the calibration text, with zero-shot tasks, and its perplexity on other text."""

    same: Quality
    other: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure ratio by ratio, share by share."""
    options = _with_defaults(parse(_parser(), arguments))
    subject = chosen_subject(options)
    if options.other_dataset not in (None, STORIES[1]):
        subject = replace(subject, name=f"{subject.name}, other text {Path(options.other_dataset).name}")
    other = replace(subject, evaluation=load_tokens(options.other_dataset, subject.tokenizer, split="evaluation"))

    def measured(model: PreTrainedModel) -> Measured:
        return Measured(
            quality_of(model, subject, options), quality_of(model, other, without_tasks(options)).perplexity
        )

    dense = measured(subject.model)
    say(f"text in distillation, {subject.name}: dense perplexity {dense.same.perplexity:.2f}, other {dense.other:.2f}")
    if options.peers:
        for name, ratio, choice in _chosen_by_peers(subject, options):
            with applied(describe(subject.model), choice):
                _append(subject, name, ratio, {}, measured(subject.model), dense, options)
        return
    for ratio, share, model in _distilled(subject, options):
        shares = {"share": share, "own_text": options.own_text}
        _append(subject, "gradprune prune", ratio, shares, measured(model), dense, options)


def _parser() -> ArgumentParser:
    made = parser(__doc__)
    add_model_options(made, f"default {SMOLLM2}")
    made.add_argument("--other_dataset", help="other text to measure on; default stories in ../shared")
    made.add_argument(
        "--shares", type=listed(float), default=None, help="weights of the next-token loss in distillation"
    )
    made.add_argument("--own_text", type=float, default=0.0, help="share of the samples that the model writes itself")
    made.add_argument("--peers", type=listed(str, PEERS), default=(), help=f"measure these instead: {', '.join(PEERS)}")
    made.add_argument("--ratios", type=listed(float), default=None)
    made.add_argument("--num_samples", type=int, default=None)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--seq_len", type=int, default=128)
    made.add_argument("--eval_samples", type=int, default=64, help="windows to measure of each text")
    add_task_options(made)
    return made


def _with_defaults(options: Namespace) -> Namespace:
    short = options.quick or options.toy
    options.shares = options.shares or ([0.0, DISTILL_TEXT] if short else [0.0, 0.05, 0.1, 0.2])
    options.ratios = options.ratios or ([0.2] if short else [0.2, 0.5])
    options.num_samples = options.num_samples or (4 if options.toy else PruneConfig().num_samples)
    if options.other_dataset is None and not options.toy:
        options.other_dataset = STORIES[1]
    return options


def _run(subject: Subject, options: Namespace) -> Run:
    config = PruneConfig(
        num_samples=options.num_samples, seq_len=options.seq_len, seed=options.seed, own_text=options.own_text
    )
    samples = draw_samples(subject.model, None, config, subject.calibration, subject.evaluation)
    return Run(describe(subject.model), config, samples)


def _chosen_by_peers(subject: Subject, options: Namespace) -> Iterator[tuple[str, float, PeerChoice]]:
    """Yield each peer, each ratio and what the peer chooses for it, on the same samples that this project gets."""
    run = _run(subject, options)
    for name in taking_part(options.peers, run.view):
        for ratio in options.ratios:
            yield name, ratio, PEERS[name](run.view, run.calibration, int(ratio * run.view.prunable))


def _distilled(subject: Subject, options: Namespace) -> Iterator[tuple[float, float, PreTrainedModel]]:
    """Yield each ratio, each share, and the model pruned with the defaults and distilled with that share.

    All share one calibration, and the models of one ratio share one repair.
    """
    run = _run(subject, options)
    view, config = run.view, run.config
    evidence = gather_evidence(run)
    for given in options.ratios:
        ratio = given * view.prunable / view.parameters
        masks = choose(view, evidence, config.scoring, config.constraints, ratio).masks
        model, repaired = repaired_copy(run, masks)
        taught = taught_samples(run, repaired)
        if taught is None:
            raise CalibrationError(
                f"num_samples: {config.num_samples} samples leave no text to judge distillation on, or the model is "
                "too large to be distilled by default; give more text, fewer samples, or a smaller model"
            )
        for share in options.shares:
            distilled = sharing_copy(model)
            distil_run(replace(run, config=replace(config, distill_text=share)), distilled, taught)
            yield given, share, distilled


def _append(
    subject: Subject,
    provider: str,
    ratio: float,
    shares: dict[str, float],
    found: Measured,
    dense: Measured,
    options: Namespace,
) -> None:
    """Record a result; shares: the text's share and the share of samples the model wrote, by name; empty for a peer."""
    extra = {
        "ratio": ratio,
        **shares,
        "seed": options.seed,
        "perplexity": found.same.perplexity,
        "perplexity_dense": dense.same.perplexity,
        "other_perplexity": found.other,
        "other_perplexity_dense": dense.other,
        "accuracies": found.same.accuracies,
        "accuracies_dense": dense.same.accuracies,
        "num_samples": options.num_samples,
        "seq_len": options.seq_len,
        "eval_windows": options.eval_samples,
        "max_questions": options.max_questions,
    }
    shape = ", ".join([percent(ratio), *(f"{percent(value)} {name}" for name, value in shares.items())])
    append(record("distilled_text", subject.name, provider, shape, "fp32", options.device, extra=extra), options.output)
    say(f"    {provider:16s} {shape:28s} perplexity {found.same.perplexity:8.2f}, other {found.other:8.2f}")


if __name__ == "__main__":
    main()
