"""How far `gradprune recover` brings a pruned model back: perplexity and zero-shot accuracy before and after.

    python -m benchmarks.quality.recovery [--minutes M | --steps N] [--tasks FOLDER --max_questions N]
    python -m benchmarks.quality.recovery --base_model MODEL --dataset TEXT --eval_dataset TEXT [--pruned DIR]

By default the model is SmolLM2-135M, pruned by 30 % of its parameters with the defaults, repair included, and recovered
with the defaults towards the dense model; its texts are two disjoint parts of WikiText-2 in the folder `shared` beside
the repository. --pruned recovers an earlier run's model instead of pruning. --steps makes the amount of training the
same on every machine, so that a record can be reproduced; --minutes limits it by the clock.
"""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.options import parse, parser
from benchmarks.progress import say
from benchmarks.quality.subjects import (
    SMOLLM2,
    Quality,
    Subject,
    add_model_options,
    add_task_options,
    chosen_subject,
    quality_of,
)
from benchmarks.results import append, percent, record
from gradprune.checkpoint.load import load_model
from gradprune.config import PruneConfig
from gradprune.config.recovery_config import RecoveryConfig
from gradprune.pipeline import prune
from gradprune.recovery.recover import recover

_DEFAULT = RecoveryConfig()


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune, recover, and measure the dense, the pruned and the recovered model."""
    options = parse(_parser(), arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    subject = chosen_subject(options)
    pruned = _pruned(subject, options)
    dense, before = (quality_of(model, subject, options) for model in (subject.model, pruned))
    _append(subject, "dense", dense, dense, {}, options)
    _append(subject, "pruned", before, dense, {}, options)
    config = RecoveryConfig(
        method=options.method, loss=options.loss, minutes=options.minutes, steps=2 if options.toy else options.steps
    )
    start = time.process_time()
    found = recover(pruned, subject.model, subject.calibration, config)
    trained = {
        "steps": found.steps,
        "best_step": found.best_step,
        "tokens": found.tokens,
        "processor_seconds": time.process_time() - start,
        **{f"recovery_{name}": value for name, value in asdict(config).items()},
    }
    _append(subject, "recovered", quality_of(pruned, subject, options), dense, trained, options)


def _parser() -> ArgumentParser:
    made = parser(__doc__)
    add_model_options(made, f"default {SMOLLM2}")
    made.add_argument("--pruned", help="checkpoint pruned from the base model, instead of pruning it")
    made.add_argument("--ratio", type=float, default=0.3, help="fraction of all parameters to remove")
    made.add_argument("--method", choices=["lora", "full"], default=_DEFAULT.method)
    made.add_argument("--loss", choices=["kd", "lm"], default=_DEFAULT.loss)
    made.add_argument("--minutes", type=float, default=_DEFAULT.minutes, help="minutes of training")
    made.add_argument("--steps", type=int, default=None, help="steps of training, instead of --minutes")
    made.add_argument("--seq_len", type=int, default=128, help="tokens per window of perplexity")
    made.add_argument("--eval_samples", type=int, default=None, help="windows to measure; default the whole text")
    add_task_options(made)
    return made


def _pruned(subject: Subject, options: Namespace) -> PreTrainedModel:
    if options.pruned is not None:
        return load_model(options.pruned, device=options.device)[0]
    config = PruneConfig(
        pruning_ratio=options.ratio, num_samples=4 if options.toy else 128, measure_speed=False, eval_samples=1
    )
    say(f"recovery of {subject.name}: pruning it by {options.ratio:.0%}")
    return prune(
        subject.model, subject.tokenizer, config, calibration=subject.calibration, evaluation=subject.evaluation
    ).model


def _append(
    subject: Subject, stage: str, measured: Quality, dense: Quality, trained: dict[str, Any], options: Namespace
) -> None:
    extra = {
        "perplexity": measured.perplexity,
        "perplexity_dense": dense.perplexity,
        "accuracies": measured.accuracies,
        "kept": measured.parameters / dense.parameters,
        "eval_windows": options.eval_samples,
        "max_questions": options.max_questions,
        **trained,
    }
    shape = f"{percent(options.ratio)} removed"
    append(record("recovery", subject.name, stage, shape, "fp32", options.device, extra=extra), options.output)
    zero_shot = f", zero-shot {fmean(measured.accuracies.values()):.1%}" if measured.accuracies else ""
    say(f"    {stage:10s} perplexity {measured.perplexity:8.2f}{zero_shot}")


if __name__ == "__main__":
    main()
