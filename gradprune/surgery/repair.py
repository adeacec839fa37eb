"""The repairs: ways to re-solve the remaining weights before the pruned ones are cut.

A repair is a function of the run and of the groups that each block keeps. It changes the model of `run.view` in place,
gives every weight that it changes memory of its own, and returns what it did to each block. A caller that still needs
the dense model passes a `sharing_copy`.
"""

from collections.abc import Callable

from gradprune.config import PruneConfig, RepairName
from gradprune.models.masks import GroupMasks
from gradprune.models.precision import rounded_products
from gradprune.progress import progress
from gradprune.run import Run
from gradprune.surgery.least_squares import BlockRepair, Repaired, least_squares

__all__ = ["REPAIRS", "BlockRepair", "RepairFunction", "Repaired"]

_TOKENS_PER_COLUMN = 2

RepairFunction = Callable[[Run, GroupMasks], Repaired]


def no_repair(_run: Run, _masks: GroupMasks) -> Repaired:
    """Leave the weights as they are."""
    return Repaired([], [])


def solve_least_squares(run: Run, masks: GroupMasks) -> Repaired:
    """Re-solve the output projections of blocks by least squares, see `gradprune.surgery.least_squares`.

    Factors of fp32 products are rounded where that is faster: on SmolLM2-135M, pruned by 20 and by 50 % of its prunable
    parameters, this changes the excess log-perplexity by less than 0.0002.
    """
    with progress(run.console, "Repairing", len(run.view.blocks), "blocks") as advance, rounded_products():
        return least_squares(run.view, masks, run.calibration, run.held_out, ranks=run.ranks, advance=advance)


def repair_warning(columns: int, config: PruneConfig) -> str | None:
    """Return a warning if the calibration samples hardly determine the weights that were solved for, else None.

    Args:
        columns: the number of columns that the widest output projection keeps.
        config: the run's, of which the samples and the repair are read.
    """
    tokens = config.num_samples * config.seq_len
    if config.repair == "none" or tokens >= _TOKENS_PER_COLUMN * columns:
        return None
    return (
        f"The repair solved for {columns:,} columns of a projection on {tokens:,} tokens, which hardly determine them. "
        f"Give at least {_TOKENS_PER_COLUMN} tokens a column: --num_samples "
        f"{-(-_TOKENS_PER_COLUMN * columns // config.seq_len)}."
    )


REPAIRS: dict[RepairName, RepairFunction] = {"none": no_repair, "least_squares": solve_least_squares}
