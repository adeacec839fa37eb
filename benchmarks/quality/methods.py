"""Perplexity by importance method and ratio, with and without H-GSP, and by Torch-Pruning's choice.

    python -m benchmarks.quality.methods [--base_model MODEL --dataset TEXT --eval_dataset TEXT] [--eval_samples N]

Without --base_model: stories260k where it lies beside the repository, the same with its KV heads repeated (which
Torch-Pruning can trace), and the demo model. One calibration pass a seed serves every method; Torch-Pruning gets the
same samples, and removes no more parameters than this project may.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.environment import ROOT
from benchmarks.options import listed, parse, parser
from benchmarks.progress import Deadline, say
from benchmarks.quality.peer import torch_pruning_scores, uniform_masks, without_grouped_queries
from benchmarks.results import append, record
from benchmarks.timing import first_line
from gradprune.calibration import batches, load_tokens, sample_windows
from gradprune.checkpoint import load_model
from gradprune.config import METHODS
from gradprune.demo import demo_model_path
from gradprune.evaluate import model_size, perplexity
from gradprune.groups import group_costs, importance_column
from gradprune.hgsp import modulate, removal_priors
from gradprune.importance import ImportanceEngine
from gradprune.masks import GroupMasks
from gradprune.models import describe
from gradprune.selection import Constraints, select
from gradprune.surgery import cut

PEER = "torch-pruning GroupTaylor"
_PRIOR_SAMPLES = 16


@dataclass(frozen=True)
class Subject:
    """A loaded model with its texts, [tokens] int64 each."""

    name: str
    model: PreTrainedModel
    calibration: Tensor
    evaluation: Tensor


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure model by model, seed by seed."""
    made = parser(__doc__)
    made.add_argument("--base_model")
    made.add_argument("--dataset")
    made.add_argument("--eval_dataset")
    made.add_argument("--ratios", type=listed(float), default=None)
    made.add_argument("--seeds", type=listed(int), default=None)
    made.add_argument("--temperatures", type=listed(float), default=None)
    made.add_argument("--num_samples", type=int, default=None)
    made.add_argument("--seq_len", type=int, default=128)
    made.add_argument("--eval_samples", type=int, default=64, help="windows to measure; 0 measures the whole text")
    options = _with_defaults(parse(made, arguments))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    deadline = Deadline(options.seconds)
    for subject in _subjects(options):
        dense = _perplexity(subject.model, subject, options)
        say(f"quality of {subject.name}: dense perplexity {dense:.2f}")
        _append(subject, "dense", 0.0, 0, subject.model, dense, dense, options)
        for seed in options.seeds:
            if not _measure_seed(subject, seed, dense, deadline, options):
                say("    the time for this run is used up")
                return


def _with_defaults(options: Namespace) -> Namespace:
    short = options.quick or options.toy
    options.ratios = options.ratios or ([0.2, 0.5] if short else [0.1, 0.2, 0.3, 0.5])
    options.seeds = options.seeds or ([0] if short else [0, 1, 2])
    options.temperatures = options.temperatures or ([0.0] if short else [0.0, 1.0])
    options.num_samples = options.num_samples or (4 if options.toy else 32 if options.quick else 128)
    options.eval_samples = 2 if options.toy else (options.eval_samples or None)
    return options


def _subjects(options: Namespace) -> Iterator[Subject]:
    shared = ROOT.parent / "shared"
    stories = shared / "models" / "stories260k"
    if options.base_model is not None:
        yield _load(options.base_model, options.dataset, options.eval_dataset, options.device)
        return
    if stories.is_dir():
        texts = [str(shared / "text" / f"stories_{part}.txt") for part in ("calibration", "eval")]
        subject = _load(str(stories), *texts, options.device)
        yield subject
        repeated = without_grouped_queries(subject.model).to(options.device)
        yield replace(subject, name=f"{subject.name}, KV heads repeated", model=repeated)
    if not (options.toy or (options.quick and stories.is_dir())):
        yield replace(_load(str(demo_model_path()), None, None, options.device), name="demo")


def _load(base_model: str, dataset: str | None, eval_dataset: str | None, device: str) -> Subject:
    model, tokenizer = load_model(base_model, device=device)
    evaluation = load_tokens(eval_dataset, tokenizer, split="evaluation")
    return Subject(Path(base_model).name, model, load_tokens(dataset, tokenizer), evaluation)


def _measure_seed(subject: Subject, seed: int, dense: float, deadline: Deadline, options: Namespace) -> bool:
    """Every method, temperature and ratio from one calibration; False if time ran out on the way."""
    model, parameters = subject.model, model_size(subject.model).parameters
    windows = sample_windows(
        subject.calibration, num_samples=options.num_samples, seq_len=options.seq_len, seed=seed
    ).to(model.device)
    for provider, ratio, masks in _choices(model, windows, parameters, options):
        if not deadline.allows(0.0):
            return False
        pruned = cut(model, masks)
        _append(subject, provider, ratio, seed, pruned, dense, _perplexity(pruned, subject, options), options)
    return True


def _choices(
    model: PreTrainedModel, windows: Tensor, parameters: int, options: Namespace
) -> Iterator[tuple[str, float, GroupMasks]]:
    """(provider, ratio, what is kept), ratio by ratio, so that each is complete before the next."""
    view = describe(model)
    with ImportanceEngine(model, "taylor") as engine:
        for batch in batches(windows, 8):
            engine.step(batch)
    priors = None
    if any(options.temperatures):
        priors = removal_priors(model, view, [windows[:_PRIOR_SAMPLES]], lambda: None)
    columns = {method: importance_column(engine.scores(method)) for method in METHODS}
    peer = _peer_scores(model, windows)
    for ratio in options.ratios:
        for temperature in options.temperatures:
            for method, importance in columns.items():
                table = modulate(replace(group_costs(view), importance=importance), temperature, 0.0, priors)
                chosen = select(table, ratio, parameters, Constraints())
                yield f"gradprune {method} T={temperature:g}", ratio, table.masks(chosen)
        if peer is not None:
            yield PEER, ratio, uniform_masks(model, *peer, int(ratio * parameters))


def _peer_scores(model: PreTrainedModel, windows: Tensor) -> tuple[list[Tensor], list[Tensor]] | None:
    """None where Torch-Pruning cannot trace the model, or is not installed."""
    if model.config.num_key_value_heads != model.config.num_attention_heads:
        return None
    try:
        return torch_pruning_scores(model, list(batches(windows, 8)))
    except ImportError as error:
        say(f"    {PEER} takes no part: {first_line(error)}")
        return None


def _perplexity(model: PreTrainedModel, subject: Subject, options: Namespace) -> float:
    return perplexity(
        model, subject.evaluation, seq_len=options.seq_len, batch_size=8, max_windows=options.eval_samples
    ).value


def _append(
    subject: Subject,
    provider: str,
    ratio: float,
    seed: int,
    pruned: PreTrainedModel,
    dense: float,
    value: float,
    options: Namespace,
) -> None:
    kept = model_size(pruned).parameters / model_size(subject.model).parameters
    extra = {
        "ratio": ratio,
        "seed": seed,
        "perplexity": value,
        "perplexity_dense": dense,
        "kept": kept,
        "num_samples": options.num_samples,
        "seq_len": options.seq_len,
        "eval_windows": options.eval_samples,
    }
    append(
        record("quality", subject.name, provider, f"{ratio:.0%}", "fp32", options.device, extra=extra), options.output
    )
    say(f"    {provider:32s} {ratio:4.0%} seed {seed}: {value:8.2f} with {kept:.1%} of the parameters")


if __name__ == "__main__":
    main()
