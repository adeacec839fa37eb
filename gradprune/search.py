"""Search: choose the scoring by held-out loss instead of guessing it.

One calibration pass has left the evidence for every method, so a candidate costs no more than masking groups and a
few forward passes. Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): all candidates on few held-out
calibration samples, the best quarter on four times as many, and the last ones on all of them, repaired as they will be
if repair is asked for. The fixed settings, every method without and with plain H-GSP, always reach the last round, so
that the result is never worse than the best of them. The evaluation text is never looked at.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from gradprune.calibration.evidence import Evidence
from gradprune.config import GRADIENT_METHODS, METHODS, Method, Normalize, PruneConfig, Scoring
from gradprune.data.windows import batches
from gradprune.models import PrunableModel
from gradprune.models.loss import mean_loss
from gradprune.models.masks import GroupMasks
from gradprune.scoring.scoring import score_groups
from gradprune.scoring.selection import select
from gradprune.surgery.least_squares import BLENDS, least_squares
from gradprune.surgery.masking import masked, output_weights_restored

# What is tried; a candidate is one of each.
TEMPERATURES: tuple[tuple[float, float | None], ...] = ((0.0, None), (0.5, 0.0), (1.0, 0.0), (1.0, math.inf))
FIXES = ("none", "adaptive")
NORMALIZATIONS: tuple[Normalize, ...] = ("none", "log")
ATTENTION_FACTORS = (0.5, 1.0, 2.0, 4.0)

_KEPT = 4  # of so many candidates, one goes on to the next round
_FINALISTS = 8


@dataclass(frozen=True)
class Trial:
    """A candidate with its loss in the last round it reached.

    loss: mean held-out loss in nats a token, over `samples` samples. repaired: with the repair of the run.
    fixed: one of the fixed settings.
    """

    scoring: Scoring
    loss: float
    samples: int
    repaired: bool
    fixed: bool


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    trials: the last round by loss, then the earlier rounds, latest first, each by loss.
    candidates: how many different selections were tried. cut_short: time ran out before the last round was over.
    """

    trials: list[Trial]
    candidates: int
    cut_short: bool

    @property
    def winner(self) -> Trial:
        """The candidate with the least loss in the last round."""
        return self.trials[0]


@dataclass(frozen=True)
class _Candidate:
    scoring: Scoring
    masks: GroupMasks
    fixed: bool


def search(
    model: PreTrainedModel,
    view: PrunableModel,
    evidence: Evidence,
    config: PruneConfig,
    kept_kv_groups: frozenset[int] | None,
    parameters: int,
    samples: Tensor,
    held_out: Tensor,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> SearchResult:
    """Find the scoring with the least held-out loss at the ratio of `config`.

    Args:
        model, view: the model, which is as it was afterwards, and its prunable view.
        evidence: of its calibration, with the priors of `config.prior`.
        config: ratio, batch size, repair and `search_minutes`.
        kept_kv_groups, parameters: of the selection, see `gradprune.scoring.selection.select`.
        samples: [N, T] calibration samples, for the repair.
        held_out: [M, T] others, M > 0, on which losses are measured.
        advance: told (evaluations done, evaluations planned).

    Deterministic, unless `search_minutes` cuts it short: then the latest complete round decides. The first round is
    always completed.
    """
    deadline = time.monotonic() + 60.0 * config.search_minutes
    pool = list(_candidates(view, evidence, config, kept_kv_groups, parameters))
    repaired = config.repair != "none"
    progress = _Progress(_planned(pool, len(held_out), repaired), advance)
    rounds: list[list[Trial]] = []
    alive = pool
    for size in _round_sizes(len(held_out)):
        parts = list(batches(held_out[:size], config.batch_size))
        trials = _play(
            alive, deadline if rounds else math.inf, progress, partial(_masked_loss, model, view, parts), size, False
        )
        if trials is None:
            return _result(rounds, pool, cut_short=True)
        rounds.append(_ranked(trials))
        alive = _survivors(alive, rounds[-1])
    if not repaired:
        return _result(rounds, pool, cut_short=False)
    loss = partial(_repaired_loss, model, view, list(batches(samples, config.batch_size)), parts)
    last = _play(alive, deadline, progress, loss, len(held_out), True)
    if last is not None:
        rounds.append(_ranked(last))
    return _result(rounds, pool, cut_short=last is None)


def _candidates(
    view: PrunableModel,
    evidence: Evidence,
    config: PruneConfig,
    kept_kv_groups: frozenset[int] | None,
    parameters: int,
) -> Iterator[_Candidate]:
    """Every scoring of the space that selects something new; the fixed settings come first."""
    seen: set[bytes] = set()
    plain = (TEMPERATURES[0], TEMPERATURES[2])
    fixed = [_scoring(config, method, temperature) for method in METHODS for temperature in plain]
    for number, scoring in enumerate(itertools.chain(fixed, _space(config, evidence))):
        table = score_groups(view, evidence, scoring)
        pruned = select(table, config.pruning_ratio, parameters, config.constraints, kept_kv_groups)
        key = np.packbits(pruned).tobytes()
        if key in seen:
            continue
        seen.add(key)
        yield _Candidate(scoring, table.masks(pruned), fixed=number < len(fixed))


def _space(config: PruneConfig, evidence: Evidence) -> Iterator[Scoring]:
    # Batches were repaired, or not, as they came.
    fixes = FIXES if evidence.reduction == "sample" else ("none" if evidence.repair is None else evidence.repair.fix,)
    for method, temperature, fix, normalize, factor in itertools.product(
        METHODS, TEMPERATURES, fixes, NORMALIZATIONS, ATTENTION_FACTORS
    ):
        if fix != "none" and method not in GRADIENT_METHODS:
            continue
        plain = _scoring(config, method, temperature)
        yield replace(plain, gradient_fix=fix, normalize_scores=normalize, attention_factor=factor)


def _scoring(config: PruneConfig, method: Method, temperature: tuple[float, float | None]) -> Scoring:
    """`method` and H-GSP, and what the search leaves as `config` has it."""
    t, tau = temperature
    return replace(config.scoring, importance_method=method, temperature=t, tau=tau, gradient_fix="none")


def _round_sizes(held_out: int) -> list[int]:
    """Held-out samples in each round before the last, e.g. 2, 8, 32."""
    sizes = [held_out]
    while sizes[0] // _KEPT >= 2:
        sizes.insert(0, sizes[0] // _KEPT)
    return sizes


def _survivors(alive: list[_Candidate], ranked: list[Trial]) -> list[_Candidate]:
    """The best quarter, at least the finalists, and all fixed settings."""
    count = max(_FINALISTS, len(alive) // _KEPT)
    best = {trial.scoring for trial in ranked[:count]}
    return [candidate for candidate in alive if candidate.fixed or candidate.scoring in best]


def _planned(pool: list[_Candidate], held_out: int, repaired: bool) -> int:
    """An upper bound of the evaluations."""
    fixed, count, total = sum(c.fixed for c in pool), len(pool), 0
    for _ in _round_sizes(held_out):
        total += count
        count = min(count, max(_FINALISTS, count // _KEPT) + fixed)
    return total + count * repaired


@dataclass
class _Progress:
    total: int
    tell: Callable[[int, int], None]
    done: int = 0

    def step(self) -> None:
        self.done += 1
        self.tell(self.done, self.total)


def _play(
    alive: list[_Candidate],
    deadline: float,
    progress: _Progress,
    loss: Callable[[_Candidate], float],
    samples: int,
    repaired: bool,
) -> list[Trial] | None:
    """One round; None where time ran out."""
    trials = []
    for candidate in alive:
        if time.monotonic() > deadline:
            return None
        trials.append(Trial(candidate.scoring, loss(candidate), samples, repaired, candidate.fixed))
        progress.step()
    return trials


def _masked_loss(
    model: PreTrainedModel, view: PrunableModel, held_out: Sequence[Tensor], candidate: _Candidate
) -> float:
    with masked(view, candidate.masks):
        return mean_loss(model, held_out)


def _repaired_loss(
    model: PreTrainedModel,
    view: PrunableModel,
    samples: Sequence[Tensor],
    held_out: Sequence[Tensor],
    candidate: _Candidate,
) -> float:
    with output_weights_restored(view, candidate.masks):
        # One blend for all: half the time, and they stay comparable.
        least_squares(model, view, candidate.masks, samples, held_out, blends=BLENDS[-1:])
        return mean_loss(model, held_out)


def _ranked(trials: list[Trial]) -> list[Trial]:
    """By loss, least first, NaN last; equals in the order they came."""
    return sorted(trials, key=lambda trial: math.inf if math.isnan(trial.loss) else trial.loss)


def _result(rounds: list[list[Trial]], pool: list[_Candidate], *, cut_short: bool) -> SearchResult:
    seen: set[Scoring] = set()
    trials = []
    for trial in itertools.chain.from_iterable(reversed(rounds)):
        if trial.scoring not in seen:
            seen.add(trial.scoring)
            trials.append(trial)
    return SearchResult(trials, len(pool), cut_short)
