"""Search: choose the scoring by held-out loss instead of guessing it.

One calibration pass yields the evidence for every method, so a candidate costs no more than masking groups and a
few forward passes. Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): all candidates on few samples,
the best quarter on four times as many, and the finalists on all of them. If repair is asked for, the finalists are
re-solved by least squares, but not distilled. The fixed settings, which are every method without and with plain H-GSP,
always reach the last round. The best candidate without repair need not be the best with it: if repair is asked for,
only re-solved candidates can replace the default.

The lowest of many measured losses is partly luck. So each candidate is compared with the default setting sample by
sample, and the default stays unless a candidate's mean difference is below zero by more than `threshold` standard
errors. The threshold is sqrt(2 ln n), about where the luckiest of n candidates that are no better is expected (the
maximum of n standard normal values), but at least 2. The search has samples of its own, which neither calibration nor
repair uses, and it never reads the evaluation text.
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
from gradprune.config import GRADIENT_METHODS, Method, Normalize, Scoring
from gradprune.data.windows import batches
from gradprune.errors import SelectionError
from gradprune.models import PrunableModel, describe
from gradprune.models.masks import GroupMasks
from gradprune.models.passes import Variant, losses_of, variant_losses
from gradprune.progress import QUIET, progress
from gradprune.ranks import ALONE
from gradprune.run import Run
from gradprune.scoring.choose import choose
from gradprune.surgery.cut import sharing_copy
from gradprune.surgery.masking import masked_layer, masks_by_block
from gradprune.surgery.repair import REPAIRS

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

    loss: mean held-out loss in nats per token, over `samples` samples. difference: mean over samples of its loss minus
    the loss of the default setting in the same round. error: the standard error of that mean. Both are 0 for the
    default. repaired: whether the repair of the run was applied. fixed: whether it is one of the fixed settings.
    """

    scoring: Scoring
    loss: float
    difference: float
    error: float
    samples: int
    repaired: bool
    fixed: bool


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    trials: each candidate's trial in the last round that it reached; those of the last round first, each round by loss.
    candidates: the number of different selections. cut_short: whether time ran out before the last round was over.
    default: the deciding round's trial of the setting that all candidates are compared with.
    decides: whether the deciding round may replace the default; if repair is asked for, this requires that another
        candidate was repaired, too.
    """

    trials: list[Trial]
    candidates: int
    cut_short: bool
    default: Trial
    decides: bool

    @property
    def threshold(self) -> float:
        """By how many standard errors a loss must be below the default's to replace it."""
        return max(2.0, math.sqrt(2.0 * math.log(self.candidates)))

    @property
    def winner(self) -> Trial:
        """The trial with the lowest loss among those surely better than the default; the default if there is none."""
        return next((trial for trial in self.deciding if self.surely_better(trial)), self.default)

    @property
    def best_other(self) -> Trial | None:
        """The trial with the lowest loss in the deciding round, except the default; None if there is no other."""
        return next((trial for trial in self.deciding if trial != self.default), None)

    def surely_better(self, trial: Trial) -> bool:
        """Whether `trial` beats the default by over `threshold` standard errors, in a round that may replace it."""
        return self.decides and trial.difference < -self.threshold * trial.error

    @property
    def deciding(self) -> list[Trial]:
        """The trials of the deciding round, which is the last one that `default` took part in, by loss."""
        last = (self.default.samples, self.default.repaired)
        return [trial for trial in self.trials if (trial.samples, trial.repaired) == last]


@dataclass(frozen=True)
class _Candidate:
    scoring: Scoring
    masks: GroupMasks
    fixed: bool


def search(run: Run, evidence: Evidence) -> SearchResult:
    """Find a scoring that is better than the default at the run's pruning ratio, if there is one.

    Args:
        run: the model, which is left as it was; the ratio, constraints, repair and `search_minutes` of its options; and
            at least two search samples.
        evidence: the evidence of the model's calibration, with the priors of `config.prior`.

    Raises:
        SelectionError: `epsilon` would leave no layer under any scoring.

    Deterministic, unless `search_minutes` cuts it short: then the last complete round decides, or the candidates that
    were repaired by then. The first round is always completed.
    """
    pool = list(_candidates(run, evidence))
    if not pool:
        raise SelectionError(
            f"epsilon: {run.config.epsilon:g} would remove every layer, whatever the scoring; choose a smaller one"
        )
    repaired = run.config.repair != "none"
    samples = len(run.samples.searched)
    # The planned number of trials is an upper bound, because fixed settings may also be among a round's best.
    with progress(run.console, "Searching", _most_trials(pool, samples, repaired), "trials") as advance:
        return _Tournament(run, pool, advance).play(repaired)


class _Tournament:
    """Rounds of candidates on ever more samples, until time runs out; the pool's first candidate is the default."""

    def __init__(self, run: Run, pool: list[_Candidate], advance: Callable[[], None]) -> None:
        self._run = run
        self._pool = pool
        self._advance = advance
        self._deadline = time.monotonic() + 60.0 * run.config.search_minutes

    def play(self, repaired: bool) -> SearchResult:
        """Play all rounds; if `repaired`, a last round repairs the candidates that are left."""
        rounds: list[list[Trial]] = []
        alive = self._pool
        searched = self._run.samples.searched
        for size in _round_sizes(len(searched)):
            parts = list(batches(searched[:size], self._run.config.batch_size))
            losses = partial(_masked_losses, self._run.view, parts)
            trials = self._round(alive, losses, repaired=False, may_end=bool(rounds))
            if len(trials) < len(alive):
                return _result(rounds, self._pool, cut_short=True, decides=not repaired)
            rounds.append(_ranked(trials))
            alive = _survivors(alive, rounds[-1])
        if not repaired:
            return _result(rounds, self._pool, cut_short=False, decides=True)
        # Because time may run out, the default goes first, then the candidates in the order of their losses.
        place = {trial.scoring: number for number, trial in enumerate(rounds[-1])}
        alive = [alive[0], *sorted(alive[1:], key=lambda candidate: place[candidate.scoring])]
        last = self._round(alive, partial(_repaired_losses, self._run, parts), repaired=True, may_end=True)
        if last:
            rounds.append(_ranked(last))
        return _result(rounds, self._pool, cut_short=len(last) < len(alive), decides=len(last) > 1)

    def _round(
        self,
        alive: list[_Candidate],
        losses: Callable[[Sequence[_Candidate]], Iterator[Tensor]],
        *,
        repaired: bool,
        may_end: bool,
    ) -> list[Trial]:
        """Play one round, divided over the ranks; return the trials of the candidates in order.

        alive: the candidates; `losses` yields each one's losses, [samples]. may_end: whether the round may end when
        time runs out, with trials of only the first candidates.
        """
        ranks = self._run.ranks
        own: list[Tensor] = []
        own_candidates = ranks.share(alive)
        own_losses = losses(own_candidates)
        for _ in own_candidates:
            if may_end and time.monotonic() > self._deadline:
                break
            own.append(next(own_losses))
            self._advance()
        # The round is complete up to the first candidate that some rank did not get to.
        next_ones = [rank + ranks.world * count for rank, count in enumerate(ranks.gather_json(len(own)))]
        played = alive[: min(next_ones)]
        for _ in played[len(own) :]:
            self._advance()
        found = ranks.joined(own[: len(ranks.share(played))])
        return [
            _compared(candidate, each, found[0], repaired=repaired)
            for candidate, each in zip(played, found, strict=True)
        ]


def _compared(candidate: _Candidate, losses: Tensor, default: Tensor, *, repaired: bool) -> Trial:
    """Return a candidate's trial from its losses and the default's, [samples] each."""
    difference = losses - default
    error = difference.std().item() / math.sqrt(len(losses))
    return Trial(
        candidate.scoring, losses.mean().item(), difference.mean().item(), error, len(losses), repaired, candidate.fixed
    )


def _candidates(run: Run, evidence: Evidence) -> Iterator[_Candidate]:
    """Yield a candidate for each scoring that selects something new: the default, other fixed settings, the space."""
    config = run.config
    seen: set[bytes] = set()
    fixed = list(_fixed(config.scoring, evidence, evidence.default_method(config.repair)))
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


def _fixed(scoring: Scoring, evidence: Evidence, default: Method) -> Iterator[Scoring]:
    """Yield every method without and with plain H-GSP, the default first; no fix unless batches already had one."""
    fix = evidence.fixes(FIXES)[0]
    methods = sorted(evidence.methods, key=lambda method: method != default)
    for method, (temperature, tau) in itertools.product(methods, (TEMPERATURES[0], TEMPERATURES[2])):
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


def _round_sizes(samples: int) -> list[int]:
    """Return the number of samples in each round of unrepaired candidates, e.g. 4, 16, 64."""
    sizes = [samples]
    while sizes[0] // _KEPT >= 2:
        sizes.insert(0, sizes[0] // _KEPT)
    return sizes


def _survivors(alive: list[_Candidate], ranked: list[Trial]) -> list[_Candidate]:
    """Return the best quarter of the candidates, but at least `_FINALISTS`, and all fixed settings."""
    count = max(_FINALISTS, len(alive) // _KEPT)
    best = {trial.scoring for trial in ranked[:count]}
    return [candidate for candidate in alive if candidate.fixed or candidate.scoring in best]


def _most_trials(pool: list[_Candidate], samples: int, repaired: bool) -> int:
    """Return an upper bound on the number of trials in all rounds."""
    fixed, count, total = sum(c.fixed for c in pool), len(pool), 0
    for _ in _round_sizes(samples):
        total += count
        count = min(count, max(_FINALISTS, count // _KEPT) + fixed)
    return total + count if repaired else total


def _masked_losses(
    view: PrunableModel, searched: Sequence[Tensor], candidates: Sequence[_Candidate]
) -> Iterator[Tensor]:
    def variant(masks: GroupMasks) -> Variant:
        changed = sorted({block.layer for block, kept in masks_by_block(view, masks) if not kept.all()})
        return Variant(lambda layer: masked_layer(view, masks, layer), changed or [0])

    return variant_losses(view, searched, [variant(candidate.masks) for candidate in candidates])


def _repaired_losses(run: Run, searched: Sequence[Tensor], candidates: Sequence[_Candidate]) -> Iterator[Tensor]:
    repair = REPAIRS[run.config.repair]
    for candidate in candidates:
        model = sharing_copy(run.view.model)
        # The ranks divide the candidates among them, so a candidate's repair is not divided again.
        repair(replace(run, view=describe(model, run.config.kinds), ranks=ALONE, console=QUIET), candidate.masks)
        yield losses_of(model, searched)


def _ranked(trials: list[Trial]) -> list[Trial]:
    """Sort trials by loss, the lowest first and NaN last; ties keep their order."""
    return sorted(trials, key=lambda trial: math.inf if math.isnan(trial.loss) else trial.loss)


def _result(rounds: list[list[Trial]], pool: list[_Candidate], *, cut_short: bool, decides: bool) -> SearchResult:
    seen: set[Scoring] = set()
    trials = []
    for trial in itertools.chain.from_iterable(reversed(rounds)):
        if trial.scoring not in seen:
            seen.add(trial.scoring)
            trials.append(trial)
    default = next(trial for trial in rounds[-1] if trial.scoring == pool[0].scoring)
    return SearchResult(trials, len(pool), cut_short, default, decides)
