"""Search: choose the scoring by held-out loss instead of guessing it.

One calibration pass yields the evidence for every method, so a candidate costs no more than masking groups and a
few forward passes. Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): all candidates on few samples,
the best quarter on four times as many, and the finalists on all of them. If repair is asked for, the finalists are
re-solved by least squares, but not distilled. The fixed settings, every method without and with plain H-GSP, always
reach the last round. What is best without repair need not be so with it: if repair is asked for, only re-solved
candidates can take the default's place.

The least of many measured losses is partly luck. So each candidate is compared with the default setting sample by
sample, and the default stays unless a candidate's mean difference is below zero by more than `threshold` of its
standard errors: sqrt(2 ln n), about where the luckiest of n candidates that are no better is expected (the maximum of n
standard normal values), and 2 at least. The samples are apart from those that calibration and repair see, and
the evaluation text is never looked at.
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

    loss: mean held-out loss in nats per token, over `samples` samples. difference: its loss minus that of the default
    setting in the same round, sample by sample, and `error` that mean's standard error; both 0 for the default.
    repaired: with the repair of the run. fixed: one of the fixed settings.
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
    """What a search found.

    trials: the last round by loss, then the earlier rounds, latest first, each by loss.
    candidates: how many different selections were tried. cut_short: time ran out before the last round was over.
    default: the setting that all are compared with, as it did in the deciding round.
    decides: whether the deciding round is one that can: others than the default are repaired, if a repair is asked for.
    """

    trials: list[Trial]
    candidates: int
    cut_short: bool
    default: Trial
    decides: bool

    @property
    def threshold(self) -> float:
        """How many standard errors below the default's a loss has to be."""
        return max(2.0, math.sqrt(2.0 * math.log(self.candidates)))

    @property
    def winner(self) -> Trial:
        """The candidate with the least loss of those that are surely better than the default; else the default."""
        return next((trial for trial in self.deciding if self.surely_better(trial)), self.default)

    @property
    def best_other(self) -> Trial | None:
        """The candidate other than the default with the least loss in the deciding round, if there is any."""
        return next((trial for trial in self.deciding if trial != self.default), None)

    def surely_better(self, trial: Trial) -> bool:
        """Whether it is better than the default by more than `threshold` standard errors, in a round that decides."""
        return self.decides and trial.difference < -self.threshold * trial.error

    @property
    def deciding(self) -> list[Trial]:
        """The trials of the deciding round, which is the last that `default` took part in, by loss."""
        last = (self.default.samples, self.default.repaired)
        return [trial for trial in self.trials if (trial.samples, trial.repaired) == last]


@dataclass(frozen=True)
class _Candidate:
    scoring: Scoring
    masks: GroupMasks
    fixed: bool


def search(run: Run, evidence: Evidence) -> SearchResult:
    """Find a scoring that is better than the default at the ratio of the run, if there is one.

    Args:
        run: the model, which is restored afterwards; ratio, constraints, repair and `search_minutes` of its options;
            search samples, two at least.
        evidence: of its calibration, with the priors of `config.prior`.

    Raises:
        SelectionError: `epsilon` would leave no layer under any scoring.

    Deterministic, unless `search_minutes` cuts it short: then the latest complete round decides, or those that were
    repaired until then. The first round is always completed.
    """
    pool = list(_candidates(run, evidence))
    if not pool:
        raise SelectionError(
            f"epsilon: {run.config.epsilon:g} would remove every layer, whatever the scoring; choose a smaller one"
        )
    repaired = run.config.repair != "none"
    samples = len(run.samples.searched)
    # An upper bound: selections that come twice are tried once.
    with progress(run.console, "Searching", _planned(pool, samples, repaired), "trials") as advance:
        return _Tournament(run, pool, advance).play(repaired)


class _Tournament:
    """Rounds of candidates on ever more samples, until time runs out. The pool's first is the default."""

    def __init__(self, run: Run, pool: list[_Candidate], advance: Callable[[], None]) -> None:
        self._run = run
        self._pool = pool
        self._advance = advance
        self._deadline = time.monotonic() + 60.0 * run.config.search_minutes

    def play(self, repaired: bool) -> SearchResult:
        """Play all rounds; the last one is of repaired candidates if `repaired`."""
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
        # The default, and then the best first: time may run out.
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
        """One round, given what yields candidates' losses [samples]; divided over the ranks.

        Fewer than the candidates, the first of them, if it may end where time runs out.
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
        # The first that a rank has not come to ends what all have.
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
    """Of a candidate's losses and the default's, [samples] each."""
    difference = losses - default
    error = difference.std().item() / math.sqrt(len(losses))
    return Trial(
        candidate.scoring, losses.mean().item(), difference.mean().item(), error, len(losses), repaired, candidate.fixed
    )


def _candidates(run: Run, evidence: Evidence) -> Iterator[_Candidate]:
    """Every scoring of the space that selects something new; first the default, then the other fixed settings."""
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
    """Every method without and with plain H-GSP, the default first; no fix but one that batches already had."""
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
    """Samples in each round before the last, e.g. 4, 16, 64."""
    sizes = [samples]
    while sizes[0] // _KEPT >= 2:
        sizes.insert(0, sizes[0] // _KEPT)
    return sizes


def _survivors(alive: list[_Candidate], ranked: list[Trial]) -> list[_Candidate]:
    """The best quarter, at least the finalists, and all fixed settings."""
    count = max(_FINALISTS, len(alive) // _KEPT)
    best = {trial.scoring for trial in ranked[:count]}
    return [candidate for candidate in alive if candidate.fixed or candidate.scoring in best]


def _planned(pool: list[_Candidate], samples: int, repaired: bool) -> int:
    """An upper bound on the number of evaluations."""
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
        # Ranks divide the candidates, and not a candidate's repair.
        repair(replace(run, view=describe(model, run.config.kinds), ranks=ALONE, console=QUIET), candidate.masks)
        yield losses_of(model, searched)


def _ranked(trials: list[Trial]) -> list[Trial]:
    """By loss, least first, NaN last; ties keep their order."""
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
