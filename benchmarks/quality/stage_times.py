"""The time of each stage of `prune` on a real model with default options, as a multiple of a plain pass.

    python -m benchmarks.quality.stage_times [--methods obs,group_fisher] [--num_samples N]
    python -m benchmarks.quality.stage_times --base_model MODEL --dataset TEXT --eval_dataset TEXT

A plain pass computes the gradients of all weights on the same samples in the same batches. It is measured before and
after each `prune`, in the same process, and stages are compared with the mean of the two, because other work on the
machine slows all of them. Perplexity is measured on as many windows as there are samples; nothing is written, and no
text is generated.
"""

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.options import listed, parse, parser
from benchmarks.progress import say
from benchmarks.quality.subjects import SMOLLM2, Subject, add_model_options, chosen_subject
from benchmarks.results import append, record
from gradprune.config import DEFAULT_METHODS, METHODS, PruneConfig
from gradprune.data.samples import draw_samples
from gradprune.data.windows import batches
from gradprune.models import describe
from gradprune.models.loss import sample_losses
from gradprune.pipeline import prune

NAME = "stages of"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune by each method, and record the stages' ratios."""
    made = parser(__doc__)
    add_model_options(made, f"default {SMOLLM2}")
    made.add_argument(
        "--methods", type=listed(str, METHODS), default=(DEFAULT_METHODS[0],), help="importance methods to measure"
    )
    made.add_argument("--prunable", type=float, default=0.2, help="fraction of the prunable parameters to remove")
    made.add_argument("--num_samples", type=int, default=None, help="default that of `gradprune prune`")
    options = parse(made, arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    subject = chosen_subject(options)
    for method in options.methods:
        _measure(subject, _config(subject.model, method, options), options)


def _config(model: PreTrainedModel, method: str, options: Namespace) -> PruneConfig:
    view = describe(model)
    ratio = options.prunable * view.prunable / view.parameters
    samples = options.num_samples or (4 if options.toy else PruneConfig().num_samples)
    return PruneConfig(
        importance_method=method, pruning_ratio=ratio, num_samples=samples, eval_samples=samples, generations=False,
        measure_speed=False,
    )  # fmt: skip


def _measure(subject: Subject, config: PruneConfig, options: Namespace) -> None:
    """Time a plain pass, `prune` and another plain pass, and record the ratios of the stages."""
    samples = draw_samples(subject.model, None, config, subject.calibration, subject.evaluation)
    parts = list(batches(samples.calibration.to(subject.model.device), config.batch_size))
    _plain(subject.model, parts[:1])
    plain = _plain(subject.model, parts)
    result = prune(
        subject.model, subject.tokenizer, config, calibration=subject.calibration, evaluation=subject.evaluation
    )
    plain = (plain + _plain(subject.model, parts)) / 2.0
    _append(subject, config, plain, result.seconds, options)


def _plain(model: PreTrainedModel, parts: Sequence[Tensor]) -> float:
    """Seconds of a forward and backward pass over all batches, which keeps no gradients."""
    start = time.perf_counter()
    for ids in parts:
        sample_losses(model, ids).sum().backward()
        model.zero_grad(set_to_none=True)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _append(
    subject: Subject, config: PruneConfig, plain: float, seconds: Mapping[str, float], options: Namespace
) -> None:
    ratios = {stage: of_stage / plain for stage, of_stage in seconds.items()}
    extra = {"plain_seconds": plain, "ratios": ratios, "whole": sum(ratios.values())}
    shape = f"{config.num_samples}x{config.seq_len} tokens by {config.batch_size}"
    provider = f"gradprune {config.importance_method}"
    append(
        record("job", f"{NAME} {subject.name}", provider, shape, "fp32", options.device, extra=extra), options.output
    )
    shown = ", ".join(f"{stage} {value:.2f}" for stage, value in ratios.items() if value >= 0.005)
    say(f"    {subject.name}, {provider}, {shape}: whole {extra['whole']:.2f} x plain ({plain:.1f} s): {shown}")


if __name__ == "__main__":
    main()
