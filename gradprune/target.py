"""Targets other than a ratio: finding the pruning ratio at which a model has a given size or measured speed."""

from collections.abc import Callable
from dataclasses import replace

from gradprune.calibration.evidence import Evidence
from gradprune.config import PruneConfig, bytes_of, count_of
from gradprune.errors import SelectionError
from gradprune.evaluation.size import model_size
from gradprune.evaluation.speed import throughput
from gradprune.models import PrunableModel
from gradprune.progress import progress
from gradprune.run import Run
from gradprune.scoring.choose import Choice, choose
from gradprune.surgery.cut import cut

_HALVINGS = 7
"""Bisection steps for a target speed, which determine its ratio to 1/128."""


def ratio_of_size(view: PrunableModel, config: PruneConfig) -> float | None:
    """Return the fraction of the model's parameters to remove to meet a target size; None if a size is not the target.

    Raises:
        SelectionError: the model already is no larger than the target.
    """
    size = model_size(view.model)
    if config.target_parameters is not None:
        name, given, left = "target_parameters", config.target_parameters, count_of(config.target_parameters)
        held, unit = size.parameters, "parameters"
    elif config.target_bytes is not None:
        name, given, held, unit = "target_bytes", config.target_bytes, size.bytes, "bytes"
        left = bytes_of(config.target_bytes)
    else:
        return None
    if left >= held:
        raise SelectionError(f"{name}: '{given}' is no less than this model's {held:,} {unit}; give less")
    # Groups hold weights of the model's dtype, so each parameter that is removed saves the bytes of one element.
    each = 1 if unit == "parameters" else view.model.dtype.itemsize
    return (held - left) / (each * size.parameters)


def at_target(run: Run, evidence: Evidence) -> Run:
    """Return a run that has a target with the smallest `pruning_ratio` that meets the target.

    Raises:
        SelectionError: no selection that the constraints allow meets the target.
    """
    config = run.config
    scoring = config.scoring
    if config.importance_method == "auto":
        # Until the search has chosen a method, use the default that it compares the others with.
        scoring = replace(scoring, importance_method=evidence.default_method(config.repair))

    def chosen(ratio: float) -> Choice:
        return choose(run.view, evidence, scoring, config.constraints, ratio)

    fraction = ratio_of_size(run.view, config)
    if fraction is not None:
        ratio = _ratio_for_size(chosen, fraction, run.view.parameters)
        if ratio is None:
            raise SelectionError(
                f"{config.target}: {config.target_value} cannot be reached, because of the constraints and of groups "
                "that must be removed together; give more, or constrain less"
            )
    else:
        assert config.target_speedup is not None
        ratio = _ratio_for_speed(run, chosen, config.target_speedup)
    return replace(run, config=replace(config, pruning_ratio=ratio))


def _ratio_for_size(chosen: Callable[[float], Choice], fraction: float, parameters: int) -> float | None:
    """Return the smallest ratio that removes at least `fraction` of the parameters, to half a group; None if none does.

    A selection may fall short of its ratio by up to the groups that are removed together: one, or as many as keep
    widths equal. So the ratio to ask for can be larger than the fraction.
    """

    def short_at(ratio: float) -> float | None:
        """Return the fraction of the parameters by which a ratio's selection falls short; None if there is none."""
        try:
            choice = chosen(ratio)
        except SelectionError:
            return None
        return fraction - int(choice.table.cost[choice.pruned].sum()) / parameters

    low, high, step = fraction, fraction, 0.0
    while (short := short_at(high)) is not None and short > 0.0:
        step = max(2.0 * step, short)
        low, high = high, fraction + step
    found = None if short is None else high
    half_a_group = int(chosen(low).table.cost.min()) / parameters / 2.0
    while high - low > half_a_group:
        middle = (low + high) / 2.0
        short = short_at(middle)
        if short is not None and short > 0.0:
            low = middle
        else:
            high, found = middle, found if short is None else middle
    return found


def _ratio_for_speed(run: Run, chosen: Callable[[float], Choice], speedup: float) -> float:
    """Find by bisection the smallest ratio at which the pruned model is at least `speedup` times as fast."""
    low, high, fastest, found = 0.0, 1.0, 1.0, None
    with progress(run.console, "Measuring speed", _HALVINGS, "ratios") as advance:
        for _ in range(_HALVINGS):
            ratio = (low + high) / 2.0
            measured = _speedup(run, chosen, ratio)
            if measured is not None:
                fastest = max(fastest, measured)
            if measured is None or measured >= speedup:
                high, found = ratio, found if measured is None else ratio
            else:
                low = ratio
            advance(1)
    if found is None:
        raise SelectionError(
            f"target_speedup: {speedup:g} cannot be reached; at the ratios that were tried, the model was at most "
            f"{fastest:.2f} times as fast on {run.view.device}"
        )
    return found


def _speedup(run: Run, chosen: Callable[[float], Choice], ratio: float) -> float | None:
    """Measure on the leading rank how many times as fast the cut model is; None if `ratio` cannot be reached."""
    try:
        choice = chosen(ratio)
    except SelectionError:
        return None
    measured = None
    if run.ranks.leads:
        models = {"dense": run.view.model, "pruned": cut(run.view.model, choice.masks)}
        speed = throughput(models, seq_len=run.config.seq_len, seed=run.config.seed, repeats=5)
        measured = speed["pruned"].p50 / speed["dense"].p50
    speedup: float = run.ranks.gather_json(measured)[0]
    return speedup
