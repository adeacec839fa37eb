"""Search: choose the scoring by held-out loss instead of guessing it.

One calibration pass yields the evidence for every method, so a candidate costs no more than masking groups and a
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

from gradprune.calibration.evidence import Evidence
from gradprune.config import GRADIENT_METHODS, Normalize, Scoring
from gradprune.data.windows import batches
from gradprune.errors import SelectionError
from gradprune.models import PrunableModel
from gradprune.models.loss import mean_loss
from gradprune.models.masks import GroupMasks
from gradprune.progress import progress
from gradprune.run import Run
from gradprune.scoring.choose import choose
from gradprune.surgery.least_squares import BLENDS, least_squares
from gradprune.surgery.masking import masked, output_weights_restored

# The search space; a candidate takes one value of each.
TEMPERATURES: tuple[tuple[float, float | None], ...] = ((0.0, None), (0.5, 0.0), (1.0, 0.0), (1.0, math.inf))
FIXES = ("none", "adaptive")
NORMALIZATIONS: tuple[Normalize, ...] = ("none", "log")
ATTENTION_FACTORS = (0.5, 1.0, 2.0, 4.0)

_KEPT = 4  # one candidate in this many goes on to the next round
_FINALISTS = 8


@dataclass(frozen=True)
class Trial:
    """A candidate with its loss in the last round it reached.

    loss: mean held-out loss in nats per token, over `samples` samples. repaired: with the repair of the run.
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


def search(run: Run, evidence: Evidence) -> SearchResult:
    """Find the scoring with the least held-out loss at the ratio of the run.

    Args:
        run: the model, which is restored afterwards; ratio, constraints, repair and `search_minutes` of its options;
            held-out samples, one at least.
        evidence: of its calibration, with the priors of `config.prior`.

    Raises:
        SelectionError: `epsilon` would leave no layer under any scoring.

    Deterministic, unless `search_minutes` cuts it short: then the latest complete round decides. The first round is
    always completed.
    """
    pool = list(_candidates(run, evidence))
    if not pool:
        raise SelectionError(
            f"epsilon: {run.config.epsilon:g} would remove every layer, whatever the scoring; choose a smaller one"
        )
    repaired = run.config.repair != "none"
    held_out = len(run.samples.held_out)
    # An upper bound: selections that come twice are tried once.
    with progress(run.console, "Searching", _planned(pool, held_out, repaired), "trials") as advance:
        return _Tournament(run, pool, advance).play(repaired)


class _Tournament:
    """Rounds of candidates on ever more held-out samples, until time runs out."""

    def __init__(self, run: Run, pool: list[_Candidate], advance: Callable[[], None]) -> None:
        self._run = run
        self._pool = pool
        self._advance = advance
        self._deadline = time.monotonic() + 60.0 * run.config.search_minutes

    def play(self, repaired: bool) -> SearchResult:
        """Play all rounds; the last one is of repaired candidates if `repaired`."""
        rounds: list[list[Trial]] = []
        alive = self._pool
        held_out = self._run.samples.held_out
        for size in _round_sizes(len(held_out)):
            parts = list(batches(held_out[:size], self._run.config.batch_size))
            loss = partial(_masked_loss, self._run.view, parts)
            trials = self._round(alive, loss, size, repaired=False, may_end=bool(rounds))
            if trials is None:
                return _result(rounds, self._pool, cut_short=True)
            rounds.append(_ranked(trials))
            alive = _survivors(alive, rounds[-1])
        if not repaired:
            return _result(rounds, self._pool, cut_short=False)
        last = self._round(alive, partial(_repaired_loss, self._run), len(held_out), repaired=True, may_end=True)
        if last is not None:
            rounds.append(_ranked(last))
        return _result(rounds, self._pool, cut_short=last is None)

    def _round(
        self,
        alive: list[_Candidate],
        loss: Callable[[_Candidate], float],
        samples: int,
        *,
        repaired: bool,
        may_end: bool,
    ) -> list[Trial] | None:
        """One round; None if time ran out."""
        trials = []
        for candidate in alive:
            if may_end and time.monotonic() > self._deadline:
                return None
            trials.append(Trial(candidate.scoring, loss(candidate), samples, repaired, candidate.fixed))
            self._advance()
        return trials


def _candidates(run: Run, evidence: Evidence) -> Iterator[_Candidate]:
    """Every scoring of the space that selects something new; the fixed settings come first."""
    config = run.config
    seen: set[bytes] = set()
    fixed = list(_fixed(config.scoring, evidence))
    for number, scoring in enumerate(itertools.chain(fixed, _space(config.scoring, evidence))):
        try:
            choice = choose(run.view, evidence, scoring, config.constraints, config.pruning_ratio)
        except SelectionError:
            continue  # under this scoring epsilon would leave no layer
        key = np.packbits(choice.pruned).tobytes()
        if key in seen:
            continue
        seen.add(key)
        yield _Candidate(scoring, choice.masks, fixed=number < len(fixed))


def _fixed(scoring: Scoring, evidence: Evidence) -> Iterator[Scoring]:
    """Every method without and with plain H-GSP; no fix but one that batches already had."""
    fix = evidence.fixes(FIXES)[0]
    for method, (temperature, tau) in itertools.product(evidence.methods, (TEMPERATURES[0], TEMPERATURES[2])):
        if fix == "none" or method in GRADIENT_METHODS:
            yield replace(scoring, importance_method=method, temperature=temperature, tau=tau, gradient_fix=fix)


def _space(scoring: Scoring, evidence: Evidence) -> Iterator[Scoring]:
    for method, (temperature, tau), fix, normalize, factor in itertools.product(
        evidence.methods, TEMPERATURES, evidence.fixes(FIXES), NORMALIZATIONS, ATTENTION_FACTORS
    ):
        if fix != "none" and method not in GRADIENT_METHODS:
            continue
        yield replace(
            scoring,
            importance_method=method,
            temperature=temperature,
            tau=tau,
            gradient_fix=fix,
            normalize_scores=normalize,
            attention_factor=factor,
        )


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
    """An upper bound on the number of evaluations."""
    fixed, count, total = sum(c.fixed for c in pool), len(pool), 0
    for _ in _round_sizes(held_out):
        total += count
        count = min(count, max(_FINALISTS, count // _KEPT) + fixed)
    return total + count * repaired


def _masked_loss(view: PrunableModel, held_out: Sequence[Tensor], candidate: _Candidate) -> float:
    with masked(view, candidate.masks):
        return mean_loss(view.model, held_out)


def _repaired_loss(run: Run, candidate: _Candidate) -> float:
    with output_weights_restored(run.view, candidate.masks):
        # One blend for all: half the time, and they stay comparable.
        least_squares(run.view, candidate.masks, run.calibration, run.held_out, blends=BLENDS[-1:])
        return mean_loss(run.view.model, run.held_out)


def _ranked(trials: list[Trial]) -> list[Trial]:
    """By loss, least first, NaN last; ties keep their order."""
    return sorted(trials, key=lambda trial: math.inf if math.isnan(trial.loss) else trial.loss)


def _result(rounds: list[list[Trial]], pool: list[_Candidate], *, cut_short: bool) -> SearchResult:
    seen: set[Scoring] = set()
    trials = []
    for trial in itertools.chain.from_iterable(reversed(rounds)):
        if trial.scoring not in seen:
            seen.add(trial.scoring)
            trials.append(trial)
    return SearchResult(trials, len(pool), cut_short)
