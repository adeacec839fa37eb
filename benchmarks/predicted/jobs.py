"""Predicted seconds and peak memory of whole jobs and their stages on a card, from counted launches."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

from benchmarks.environment import environment
from benchmarks.jobs import streamed as larger
from benchmarks.jobs import whole
from benchmarks.jobs.calibrators import NEEDED
from benchmarks.kernels.cases import LLAMA_8B
from benchmarks.predicted.counted import Counted, llama
from benchmarks.predicted.roofline import STREAMED, Card, pass_seconds
from benchmarks.predicted.stages import (
    cut_forward_pass,
    distillation_pass,
    gram_sum,
    lost_at,
    removal_of_all,
    repair_pass,
)
from benchmarks.predicted.steps import engine_step, forward_pass, plain_step
from benchmarks.results import Kind, Record, run_id
from gradprune import PruneConfig
from gradprune.config import CURVATURE_SAMPLES, DISTILL_JUDGED
from gradprune.config.domains import bytes_of
from gradprune.models import describe
from gradprune.models.footprint import samples_followed

OURS = "gradprune triton"
_LAYERS = 32


def passes(card: Card, toy: bool) -> Iterator[Record]:
    """Predict the calibrations of the whole job by each provider, its stages and their sum, and distillation."""
    job, layers = whole.FULL, 2 if toy else None
    method = PruneConfig().importance_method
    tokens, batch = job.compared.tokens, job.compared.batch
    steps = job.compared.samples // batch
    counted: dict[str, Callable[[int], Counted]] = {
        f"calibration, {OURS}{NEEDED}": lambda batch: engine_step(job.size, layers, method, batch, tokens),
        f"calibration, {OURS}": lambda batch: engine_step(job.size, layers, "taylor", batch, tokens),
        "calibration, plain": lambda batch: plain_step(job.size, layers, batch, tokens, weights=True),
    }
    for provider, count in counted.items():
        step = count(batch)
        yield _of_pass(card, job.compared.text, provider, steps * pass_seconds(step, card), step.peak)
    needed, every = (count(job.batch) for count in list(counted.values())[:2])
    found = list(_stages(card, needed, every, layers, toy))
    yield from found
    total, peak = sum(stage.ms_p50 or 0.0 for stage in found), max(stage.peak_memory or 0 for stage in found)
    yield _of_pass(card, job.load(job.samples).text, whole.OURS, total / 1e3, peak)
    yield _of_pass(card, job.load(job.samples).text, "removal paths of obs", _removals(card, toy), 0)
    yield _distillation(card, layers)


def _stages(card: Card, needed: Counted, every: Counted, layers: int | None, toy: bool) -> Iterator[Record]:
    """Predict the stages of `prune` that run on the card.

    Args:
        card: the GPU.
        needed: a step of calibration that collects the evidence that the method needs.
        every: a step that collects all evidence.
        layers: see `llama`.
        toy: whether the removal paths and Gram sums of `obs` are those of a toy model.
    """
    job, config = whole.FULL, PruneConfig()
    load, shape, lost = job.load(job.samples), (job.batch, job.compared.tokens), lost_at(job.size, config.pruning_ratio)
    weights = config.collect_batches
    of_every, of_needed = (pass_seconds(step, card) for step in (every, needed))
    stepped = min(job.samples, CURVATURE_SAMPLES if config.curvatures_alone else job.samples)
    total = weights * of_every + (stepped // job.batch - weights) * of_needed
    yield _of_pass(card, load.text, "stage calibration", total, max(every.peak, needed.peak))
    before = forward_pass(job.size, layers, *shape)
    if config.importance_method == "obs":
        each = pass_seconds(before, card) + _gram_sums(card, shape[0] * shape[1], toy)
        of_all = job.samples // job.batch * each + _removals(card, toy) + _followed(card, layers)
        yield _of_pass(card, load.text, "stage importance", of_all, before.peak)
    yield _of_pass(card, load.text, "stage perplexity_before", pass_seconds(before, card), before.peak)
    # The first layer reads nothing from a repaired layer, so the cost of a layer is that of the third.
    two, three = (_counted_repair(each, lost, shape) for each in (2, 3))
    of_all = _of_layers(2, *(pass_seconds(each, card) for each in (two, three)), layers)
    yield _of_pass(card, load.text, "stage repair", of_all, three.peak)
    after = cut_forward_pass(job.size, layers, lost, *shape)
    yield _of_pass(card, load.text, "stage perplexity_after", pass_seconds(after, card), after.peak)


def _distillation(card: Card, layers: int | None) -> Record:
    """Predict distillation, which so large a model gets only on request, on the default number of tokens."""
    job, lost = whole.FULL, lost_at(whole.FULL.size, PruneConfig().pruning_ratio)
    shape = job.distilled(job.samples), DISTILL_JUDGED, job.compared.tokens
    counted = [_counted_distillation(job.size, each, lost, *shape) for each in (1, 2)]
    seconds = _of_layers(1, *(pass_seconds(each, card) for each in counted), layers)
    peak = _of_layers(1, *(float(each.peak) for each in counted), layers)
    return _of_pass(card, job.load(job.samples).text, whole.DISTILLED, seconds, int(peak))


_counted_distillation = cache(distillation_pass)


def _of_layers(fewer: int, of_fewer: float, of_one_more: float, layers: int | None) -> float:
    """The cost of all layers, extrapolated from that of `fewer` layers and of one more; None: of _LAYERS layers."""
    count = _LAYERS if layers is None else layers
    return of_fewer + (count - fewer) * (of_one_more - of_fewer)


@cache
def _counted_repair(layers: int, lost: float, shape: tuple[int, int]) -> Counted:
    job = whole.FULL
    return repair_pass(job.size, layers, lost, job.samples // job.batch, job.held_out // job.batch, shape)


def _removals(card: Card, toy: bool) -> float:
    """Seconds of the removal paths of all blocks, which `obs` computes."""
    layers, (hidden, channels) = _blocks(toy)
    of_attention, of_mlp = _counted_removals(hidden, 8, hidden // 8), _counted_removals(hidden, channels, 1)
    return layers * sum(pass_seconds(each, card) for each in (of_attention, of_mlp))


_counted_removals = cache(removal_of_all)


def _followed(card: Card, layers: int | None) -> float:
    """Seconds of measuring reach: every block's residual stream of a few samples passes half of the layers on average.

    The head then predicts every second token, which is counted as half of its cost.
    """
    job, count = whole.FULL, _LAYERS if layers is None else layers
    blocks = 2 * count
    shape = samples_followed(job.samples, blocks), job.compared.tokens
    one, two = (pass_seconds(forward_pass(job.size, each, *shape), card) for each in (1, 2))
    layer, head = two - one, 2 * one - two
    return blocks * (count * layer + head) / 2


def _gram_sums(card: Card, tokens: int, toy: bool) -> float:
    """Seconds of adding one batch to the Gram matrices of all blocks."""
    layers, widths = _blocks(toy)
    return layers * sum(pass_seconds(_counted_gram_sum(tokens, width), card) for width in widths)


_counted_gram_sum = cache(gram_sum)


def _blocks(toy: bool) -> tuple[int, tuple[int, int]]:
    """The number of layers, and the number of columns of attention's and of the MLP's output projection."""
    return (2, (64, 96)) if toy else (_LAYERS, LLAMA_8B["down"])


def streamed(card: Card) -> Record:
    """Predict the job of the 70B model within 24 GiB, whose time is that of copying its weights to the card."""
    samples, tokens, size, config = *larger.LOAD, "70B", PruneConfig()
    view = describe(llama(size))
    layers = len(view.layers)
    stream = (layers + 1) * tokens * view.model.config.hidden_size * 2
    waves = -(-samples // max(1, bytes_of(config.stream_memory) // stream))
    of_layers = 2 * sum(parameter.numel() for parameter in view.layers.parameters())
    # Twice per wave, for the perplexities before and after, and when the cut layers are assembled.
    crossings = 2 * waves + 2 * (1.0 - config.pruning_ratio) + 1
    transfer = crossings * of_layers / STREAMED
    one, two = (pass_seconds(engine_step(size, each, config.importance_method, 1, tokens), card) for each in (1, 2))
    compute = samples * (one + (layers - 1) * (two - one))
    shape = f"Llama {size} of {layers} layers, {samples}x{tokens} tokens"
    milliseconds = 1e3 * max(transfer, compute)
    return predicted("predicted", larger.NAME, larger.OURS, shape, milliseconds, card.name, {"of": "job"})


def _of_pass(card: Card, load: str, provider: str, seconds: float, peak: int) -> Record:
    job = whole.FULL
    shape = f"Llama {job.size}, {load}"
    made = predicted("predicted", whole.NAME, provider, shape, 1e3 * seconds, card.name, {"of": "job"})
    return replace(made, peak_memory=peak)


def predicted(
    kind: Kind,
    name: str,
    provider: str,
    shape: str,
    milliseconds: float | None,
    hardware: str,
    extra: dict[str, object],
) -> Record:
    """A record of a prediction for `hardware`."""
    where = replace(environment("cpu"), device="cuda", hardware=hardware)
    return Record(kind, name, provider, shape, "bf16", where, run_id(), ms_p50=milliseconds, extra=extra)
