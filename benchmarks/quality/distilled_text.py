"""What the text's share in distillation brings on text of the calibration's kind, and what it costs on other text.

    python -m benchmarks.quality.distilled_text [--shares 0,0.05,0.1,0.2] [--tasks FOLDER --max_questions N]
    python -m benchmarks.quality.distilled_text --own_text 0.5 --shares 0.1 [--tasks FOLDER --max_questions N]

The second is of samples half of which the model writes itself. By default SmolLM2-135M, calibrated on WikiText-2; the
other text is of stories. --base_model, --dataset, --eval_dataset and --other_dataset name others. Ratios are of the
prunable parameters. Not part of `make bench`, because SmolLM2-135M takes half an hour; --quick measures one ratio and
two shares.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from benchmarks.options import listed, parse, parser
from benchmarks.progress import say
from benchmarks.quality.methods import (
    SMOLLM2,
    Quality,
    Subject,
    chosen_subject,
    quality_of,
    shared_texts,
    without_tasks,
)
from benchmarks.results import append, record
from gradprune.calibration.gather import gather_evidence
from gradprune.config import DISTILL_TEXT, PruneConfig
from gradprune.data.samples import draw_samples
from gradprune.data.sources import load_tokens
from gradprune.models import describe
from gradprune.run import Run
from gradprune.scoring.choose import choose
from gradprune.surgery.cut import cut, sharing_copy
from gradprune.surgery.distillation import distil_run, taught_samples
from gradprune.surgery.repair import REPAIRS


class Measured(NamedTuple):
    """A model's quality on text of the calibration's kind, with the tasks, and its perplexity on other text."""

    same: Quality
    other: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure ratio by ratio, share by share."""
    options = _with_defaults(parse(_parser(), arguments))
    subject = chosen_subject(options)
    other = replace(subject, evaluation=load_tokens(options.other_dataset, subject.tokenizer, split="evaluation"))

    def measured(model: PreTrainedModel) -> Measured:
        return Measured(
            quality_of(model, subject, options), quality_of(model, other, without_tasks(options)).perplexity
        )

    dense = measured(subject.model)
    say(f"text in distillation, {subject.name}: dense perplexity {dense.same.perplexity:.2f}, other {dense.other:.2f}")
    for ratio, share, model in _distilled(subject, options):
        _append(subject, ratio, share, measured(model), dense, options)


def _parser() -> Any:
    made = parser(__doc__)
    made.add_argument("--base_model", help=f"default {SMOLLM2}")
    made.add_argument("--dataset")
    made.add_argument("--eval_dataset")
    made.add_argument("--other_dataset", help="default stories beside the repository")
    made.add_argument("--shares", type=listed(float), default=None, help="of the text in what distillation teaches")
    made.add_argument("--own_text", type=float, default=0.0, help="of the samples, the share the model writes itself")
    made.add_argument("--ratios", type=listed(float), default=None)
    made.add_argument("--num_samples", type=int, default=None)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--seq_len", type=int, default=128)
    made.add_argument("--eval_samples", type=int, default=64, help="windows to measure of each text")
    made.add_argument("--tasks", type=Path, default=None, help="folder of .jsonl files with zero-shot questions")
    made.add_argument("--max_questions", type=int, default=None, help="at most this many of each task")
    return made


def _with_defaults(options: Namespace) -> Namespace:
    short = options.quick or options.toy
    options.shares = options.shares or ([0.0, DISTILL_TEXT] if short else [0.0, 0.05, 0.1, 0.2])
    options.ratios = options.ratios or ([0.2] if short else [0.2, 0.5])
    options.num_samples = options.num_samples or (4 if options.toy else PruneConfig().num_samples)
    if options.other_dataset is None and not options.toy:
        options.other_dataset = shared_texts("stories")[1]
    return options


def _distilled(subject: Subject, options: Namespace) -> Iterator[tuple[float, float, PreTrainedModel]]:
    """A ratio, a share and the model pruned by the defaults and distilled so; one calibration and a repair a ratio."""
    view = describe(subject.model)
    config = PruneConfig(
        num_samples=options.num_samples, seq_len=options.seq_len, seed=options.seed, own_text=options.own_text
    )
    run = Run(view, config, draw_samples(subject.model, None, config, subject.calibration, subject.evaluation))
    evidence = gather_evidence(run)
    for given in options.ratios:
        ratio = given * view.prunable / view.parameters
        masks = choose(view, evidence, config.scoring, config.constraints, ratio).masks
        model = sharing_copy(subject.model)
        repaired = REPAIRS[config.repair](replace(run, view=describe(model)), masks)
        model = cut(model, masks, inplace=True)
        taught = taught_samples(run, repaired)
        assert taught is not None
        for share in options.shares:
            distilled = sharing_copy(model)
            distil_run(replace(run, config=replace(config, distill_text=share)), distilled, taught)
            yield given, share, distilled


def _append(subject: Subject, ratio: float, share: float, found: Measured, dense: Measured, options: Namespace) -> None:
    extra = {
        "ratio": ratio,
        "share": share,
        "own_text": options.own_text,
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
    shape = f"{ratio:.0%}, {share:.0%} of the text, {options.own_text:.0%} own text"
    append(
        record("distilled_text", subject.name, "gradprune prune", shape, "fp32", options.device, extra=extra),
        options.output,
    )
    say(f"    {shape:24s} perplexity {found.same.perplexity:8.2f}, other {found.other:8.2f}")


if __name__ == "__main__":
    main()
