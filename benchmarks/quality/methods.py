"""Perplexity by importance method and ratio, with and without H-GSP and repair, and of peers.

    python -m benchmarks.quality.methods [--base_model MODEL --dataset TEXT --eval_dataset TEXT] [--eval_samples N]
    python -m benchmarks.quality.methods --models smollm2-135m --prunable [--tasks FOLDER]

Without --base_model, the models are stories260k, if it is in the folder `shared` beside the repository, and the demo
model; each also with its KV heads repeated, which Torch-Pruning can trace. SmolLM2-135M is measured if it is named, on
texts of WikiText-2. One calibration per seed serves every method; peers get the same samples, and may remove no more
parameters than this project. The whole table with --search takes hours; --quick measures one ratio, seed and
temperature of it, with the same samples.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.options import listed, parse, parser
from benchmarks.progress import Deadline, say
from benchmarks.quality.peers import PEERS, taking_part
from benchmarks.quality.peers.choice import PeerChoice, applied, obstacle, uniform_masks
from benchmarks.quality.peers.torch_pruning import torch_pruning_scores
from benchmarks.quality.pruned import Pruned
from benchmarks.quality.subjects import (
    MODELS,
    SMOLLM2,
    Quality,
    Subject,
    add_model_options,
    add_task_options,
    quality_of,
    subjects,
    without_tasks,
)
from benchmarks.results import append, percent, record
from benchmarks.timing import first_line
from gradprune.calibration.evidence import Evidence
from gradprune.calibration.gather import gather_evidence
from gradprune.config import DEFAULT_METHODS, METHODS, PruneConfig, Scoring
from gradprune.data.samples import draw_samples
from gradprune.data.windows import batches
from gradprune.evaluation.size import model_size
from gradprune.models import BlockKey, describe
from gradprune.run import Run
from gradprune.scoring.choose import choose
from gradprune.search import search
from gradprune.shots import after_shots

TORCH_PRUNING = "torch-pruning GroupTaylor"
SEARCH = "gradprune search + least squares"
# Without "reap", which scores only experts, because the models here have none.
DENSE_METHODS = tuple(method for method in METHODS if method != "reap")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure model by model, seed by seed."""
    made = _parser()
    options = _with_defaults(parse(made, arguments))
    if unknown := sorted(set(options.providers or ()) - set(_providers(options))):
        made.error(f"--providers: '{unknown[0]}' is none of {', '.join(_providers(options))}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    deadline = Deadline(options.seconds)
    for subject in subjects(options):
        if options.prunable:
            # The name keeps ratios of the prunable and of all parameters, and different numbers of samples, in
            # separate tables.
            about = f"ratios of its prunable parameters, {options.num_samples} samples"
            subject = replace(subject, name=f"{subject.name}, {about}")
        asked = _is_asked("dense", options)
        dense = quality_of(subject.model, subject, options if asked else without_tasks(options))
        say(f"quality of {subject.name}: dense perplexity {dense.perplexity:.2f}")
        if asked:
            _append(subject, "dense", 0.0, 0, dense, dense, options)
        for seed in options.seeds:
            if not _measure_seed(subject, seed, dense, deadline, options):
                say("    the time for this run is used up")
                return


def _parser() -> ArgumentParser:
    made = parser(__doc__)
    add_model_options(made)
    made.add_argument(
        "--models",
        type=listed(str, (*MODELS, SMOLLM2)),
        default=MODELS,
        help=f"without --base_model: {', '.join((*MODELS, SMOLLM2))}",
    )
    made.add_argument(
        "--methods", type=listed(str, METHODS), default=DENSE_METHODS, help="importance methods to measure"
    )
    made.add_argument("--peers", type=listed(str, PEERS), default=tuple(PEERS), help="peers to measure")
    made.add_argument("--providers", type=listed(str), default=None, help="measure only these, named as in tables")
    made.add_argument("--ratios", type=listed(float), default=None)
    made.add_argument("--prunable", action="store_true", help="ratios are of the prunable parameters, not of all")
    made.add_argument("--seeds", type=listed(int), default=None)
    made.add_argument("--temperatures", type=listed(float), default=None)
    made.add_argument("--num_samples", type=int, default=None)
    made.add_argument("--seq_len", type=int, default=128)
    made.add_argument("--shots", type=int, default=1, help="above 1: also measure obs in that many shots")
    made.add_argument(
        "--search", action="store_true", help="also measure the search, which takes minutes per ratio and seed"
    )
    made.add_argument("--eval_samples", type=int, default=64, help="windows to measure; 0 measures the whole text")
    add_task_options(made)
    return made


def _with_defaults(options: Namespace) -> Namespace:
    short = options.quick or options.toy
    options.ratios = options.ratios or ([0.2] if short else [0.1, 0.2, 0.3, 0.5])
    options.seeds = options.seeds or ([0] if short else [0, 1, 2])
    options.temperatures = options.temperatures or ([0.0] if short else [0.0, 1.0])
    options.num_samples = options.num_samples or (4 if options.toy else PruneConfig().num_samples)
    options.eval_samples = 2 if options.toy else (options.eval_samples or None)
    return options


def _providers(options: Namespace) -> list[str]:
    """Names of all providers that the other options select."""
    by_method = [name for each in options.temperatures for method in options.methods for name in _names(method, each)]
    asked = [_shots_name(options)] * (options.shots > 1) + [SEARCH] * options.search
    return ["dense", *by_method, *asked, TORCH_PRUNING, *options.peers]


@dataclass(frozen=True)
class ProviderChoice:
    """A provider's selection. model: function that makes the pruned model.

    peer: the choice of one of `PEERS`, which compensates in its own way; `model` then lacks that compensation. None for
        all other providers.
    """

    provider: str
    ratio: float
    model: Callable[[], PreTrainedModel]
    peer: PeerChoice | None = None


def _measure_seed(subject: Subject, seed: int, dense: Quality, deadline: Deadline, options: Namespace) -> bool:
    """Measure every method, temperature and ratio from one calibration; return False if time ran out on the way."""
    model = subject.model
    config = PruneConfig(
        num_samples=options.num_samples,
        seq_len=options.seq_len,
        seed=seed,
        held_out_samples=32,
    )
    # "auto" also draws the samples on which the search compares its candidates.
    drawn = replace(config, importance_method="auto") if options.search else config
    samples = draw_samples(model, None, drawn, subject.calibration, subject.evaluation)
    run = Run(describe(model), config, samples)
    for choice in _choices(run, options):
        if not _is_asked(choice.provider, options):
            continue
        if not deadline.allows(0.0):
            return False
        measured = pruned_quality(choice, subject, options)
        _append(subject, choice.provider, choice.ratio, seed, measured, dense, options)
    return True


def _is_asked(provider: str, options: Namespace) -> bool:
    return options.providers is None or provider in options.providers


def pruned_quality(choice: ProviderChoice, subject: Subject, options: Namespace) -> Quality:
    """Measure the subject's model, pruned as chosen."""
    if choice.peer is None:
        return quality_of(choice.model(), subject, options)
    with applied(describe(subject.model), choice.peer):
        measured = quality_of(subject.model, subject, options)
    added = sum(len(bias) for bias in choice.peer.biases.values())
    return replace(measured, parameters=model_size(choice.model()).parameters + added)


def _choices(run: Run, options: Namespace) -> Iterator[ProviderChoice]:
    """Yield all providers' choices, ratio by ratio, so that each ratio is complete before the next."""
    run = replace(run, config=replace(run.config, search_minutes=60.0, **_evidence(options)))
    evidence = gather_evidence(run)
    traced = _torch_pruning(run) if _is_asked(TORCH_PRUNING, options) else None
    peers = list(taking_part((peer for peer in options.peers if _is_asked(peer, options)), run.view))
    prunable = run.view.prunable / run.view.parameters
    for given in options.ratios:
        ratio = given * prunable if options.prunable else given
        at_ratio = replace(run, config=replace(run.config, pruning_ratio=ratio))
        yield from _by_method(at_ratio, evidence, given, options)
        yield from _by_shots_and_search(at_ratio, evidence, given, options)
        budget = int(ratio * run.view.parameters)
        if traced is not None:
            masks = uniform_masks(run.view, traced, budget)
            yield ProviderChoice(TORCH_PRUNING, given, Pruned(run, masks).as_cut)
        for name in peers:
            yield peer_choice(name, run, given, budget)


def _by_method(run: Run, evidence: Evidence, given: float, options: Namespace) -> Iterator[ProviderChoice]:
    """Yield, by temperature and method, the model as cut and as repaired, and with the default method as distilled."""
    for temperature in options.temperatures:
        for method in options.methods:
            scoring = Scoring(importance_method=method, temperature=temperature, tau=0.0)
            pruned = _pruned(run, evidence, scoring)
            models = (pruned.as_cut, pruned.repaired, pruned.distilled)
            for name, model in zip(_names(method, temperature), models, strict=False):
                yield ProviderChoice(name, given, model)


def _names(method: str, temperature: float) -> list[str]:
    """Names in tables for a method's model as cut, as repaired and, with the default method, as distilled."""
    after = ["", " + least squares", *([" + distillation"] if method == DEFAULT_METHODS[0] else [])]
    return [f"gradprune {method}{each} T={temperature:g}" for each in after]


def _by_shots_and_search(run: Run, evidence: Evidence, given: float, options: Namespace) -> Iterator[ProviderChoice]:
    """Yield the choices of several shots and of the search, which take minutes and are only made if asked for."""
    name = _shots_name(options)
    if options.shots > 1 and _is_asked(name, options):
        config = replace(run.config, importance_method="obs", shots=options.shots)
        scored = after_shots(replace(run, config=config), evidence)
        yield ProviderChoice(name, given, _pruned(run, scored, config.scoring).repaired)
    if options.search and _is_asked(SEARCH, options):
        yield ProviderChoice(SEARCH, given, _pruned(run, evidence, search(run, evidence).winner.scoring).repaired)


def _shots_name(options: Namespace) -> str:
    return f"gradprune obs in {options.shots} shots + least squares"


def _pruned(run: Run, evidence: Evidence, scoring: Scoring) -> Pruned:
    masks = choose(run.view, evidence, scoring, run.config.constraints, run.config.pruning_ratio).masks
    return Pruned(run, masks)


def peer_choice(name: str, run: Run, given: float, budget: int) -> ProviderChoice:
    """Return the choice of one of `PEERS` on the run's samples, which removes at most `budget` parameters.

    given: the ratio to record.
    """
    found = PEERS[name](run.view, run.calibration, budget)
    return ProviderChoice(name, given, Pruned(run, found.masks).as_cut, found)


def _evidence(options: Namespace) -> dict[str, Any]:
    """Options for what calibration collects: for a single method only what it needs, otherwise everything."""
    if options.search or options.shots > 1 or len(options.methods) > 1:
        return {"importance_method": "auto"}
    return {"importance_method": options.methods[0], "temperature": max(options.temperatures)}


def _torch_pruning(run: Run) -> dict[BlockKey, Tensor] | None:
    """Torch-Pruning's scores; None, with the reason shown, if it cannot trace the model or is not installed."""
    fault = obstacle(run.view, uniform=True)
    if any(block.heads_per_group > 1 for block in run.view.linear_blocks):
        fault = "its graph of a model with grouped queries may not end"
    if fault is None:
        try:
            return torch_pruning_scores(run.view.model, list(batches(run.samples.calibration, 8)))
        except Exception as error:  # whatever a peer raises leaves the others to be measured
            fault = first_line(error)
    say(f"    {TORCH_PRUNING} takes no part: {fault}")
    return None


def _append(
    subject: Subject, provider: str, ratio: float, seed: int, measured: Quality, dense: Quality, options: Namespace
) -> None:
    kept = measured.parameters / dense.parameters
    extra = {
        "ratio": ratio,
        "seed": seed,
        "perplexity": measured.perplexity,
        "perplexity_dense": dense.perplexity,
        "accuracies": measured.accuracies,
        "kept": kept,
        "num_samples": options.num_samples,
        "seq_len": options.seq_len,
        "eval_windows": options.eval_samples,
        "max_questions": options.max_questions if measured.accuracies else None,
    }
    append(
        record("quality", subject.name, provider, percent(ratio), "fp32", options.device, extra=extra), options.output
    )
    zero_shot = f", zero-shot {fmean(measured.accuracies.values()):.1%}" if measured.accuracies else ""
    shown = f"{measured.perplexity:8.2f} with {kept:.1%} of the parameters{zero_shot}"
    say(f"    {provider:32s} {percent(ratio):>5s} seed {seed}: {shown}")


if __name__ == "__main__":
    main()
