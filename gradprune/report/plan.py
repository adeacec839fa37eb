"""The plan of a run (`gradprune plan`), formatted for the terminal."""

from collections.abc import Iterator

from rich.table import Table

from gradprune.errors import counted
from gradprune.models.sizes import with_unit
from gradprune.plan import Plan, PlannedRun


def plan_table(plan: Plan) -> Table:
    """Tabulate one rank's peak memory and bytes read, for each way to run and each stage."""
    what = f"{plan.shape.parameters:,} parameters, {with_unit(plan.shape.bytes)}"
    room = f"{with_unit(plan.room.bytes)} {'on' if plan.room.accelerated else 'free on'} {plan.room.name}"
    table = Table(title=f"{what}; {room}", title_justify="left")
    for column in ("run", "stage", "device", "host", "read"):
        table.add_column(column, justify="left" if column in ("run", "stage") else "right")
    for run in plan.runs:
        for number, stage in enumerate(run.footprint.stages):
            device = with_unit(stage.device) if plan.room.accelerated else "-"
            moved = with_unit(stage.moved) if stage.moved else "-"
            table.add_row(run.name if not number else "", stage.name, device, with_unit(stage.host), moved)
    return table


def fitting_lines(plan: Plan) -> Iterator[str]:
    """Yield lines that say which ways to run fit, and what to change if one does not."""
    for run in plan.runs:
        yield f"{run.name}: {_verdict(plan, run)}"
    if not plan.streamable:
        return
    gib = -(-plan.one_wave // 2**30)
    yield f"stream_layers auto: {'on' if plan.streams else 'off'}; one wave for all samples: --stream_memory {gib}GiB"


def _verdict(plan: Plan, run: PlannedRun) -> str:
    largest = run.footprint.largest
    peak = f"{with_unit(run.footprint.peak)} ({largest.name})"
    waves = f", {counted(run.footprint.waves, 'wave')}" if run.streamed else ""
    if run.fits:
        return f"fits, {peak}; --batch_size up to {run.largest_batch}{waves}"
    if run.largest_batch:
        return f"does not fit, {peak}; --batch_size {run.largest_batch} does"
    least = with_unit(plan.shape.layer_bytes)
    return f"does not fit at any batch size, {peak}" + (f"; one layer takes {least}" if run.streamed else "")
