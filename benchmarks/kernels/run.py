"""Measure each op of the engine against PyTorch and against the limits of the hardware.

    python -m benchmarks.kernels.run [--ops taylor_score,grad_stats] [--device cuda] [--quick]

GB/s are the least bytes that the op must move, divided by the median time, so a provider that moves more shows less.
"""

from argparse import Namespace
from collections.abc import Sequence

from benchmarks.kernels import (
    cheapest_removals,
    grad_stats,
    grouped_linear_importance,
    linear_importance,
    mask_gradient,
    scale_gradients,
    taylor_score,
)
from benchmarks.kernels.op import Case, Op
from benchmarks.options import listed, parse, parser
from benchmarks.progress import Deadline, say
from benchmarks.results import Record, append, record
from benchmarks.timing import Provider, Timing, free, measure

_MODULES = (
    taylor_score, linear_importance, grouped_linear_importance, mask_gradient, cheapest_removals, grad_stats,
    scale_gradients,
)  # fmt: skip
OPS = {module.OP.name: module.OP for module in _MODULES}
_REPEATS = {"full": 40, "quick": 10, "toy": 3}
_SECONDS = {"full": 3.0, "quick": 2.0, "toy": 0.2}
# Seconds that a case's inputs, checks and compilation may take before the first timing.
_PREPARATION = 8.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the requested ops, case by case."""
    made = parser(__doc__)
    made.add_argument("--ops", type=listed(str, OPS), default=list(OPS), help=f"of {', '.join(OPS)}")
    options = parse(made, arguments)
    size = "toy" if options.toy else "quick" if options.quick else "full"
    deadline = Deadline(options.seconds)
    queues = [(OPS[name], OPS[name].cases(options.device, size)) for name in options.ops]
    # Ops alternate, one case of each, so that a deadline shortens every op's list instead of dropping the last ops.
    for number in range(max(len(cases) for _, cases in queues)):
        for op, cases in queues:
            if number < len(cases):
                _benchmark(op, cases[number], size, deadline, options)


def _benchmark(op: Op, case: Case, size: str, deadline: Deadline, options: Namespace) -> None:
    """Measure one case, print its table, append its records."""
    say(f"{op.name} {case.label} [{case.text}] {case.dtype} on {options.device}")
    if size != "toy" and not deadline.allows(_PREPARATION + _SECONDS[size]):
        append(
            _record(op, case, "all", options.device, error="skipped: the time for this run was used up"), options.output
        )
        return
    providers = op.providers(case, options.device)
    found = measure(
        providers,
        lambda number: op.inputs(case, number, options.device),
        op.input_bytes(case),
        device=options.device,
        repeats=_REPEATS[size],
        seconds=_SECONDS[size],
    )
    for made in records(op, case, providers, found, options.device):
        append(made, options.output)
        say(_line(made))
    free(options.device)


def records(op: Op, case: Case, providers: Sequence[Provider], found: dict[str, Timing], device: str) -> list[Record]:
    """One record per provider, each compared with the fastest floor."""
    floors = [found[provider.name].p50 for provider in providers if provider.floor]
    floor = min((value for value in floors if value is not None), default=None)
    return [
        _record(
            op,
            case,
            provider.name,
            device,
            **_rates(op, case, found[provider.name].p50, floor),
            **found[provider.name].values(),
            extra={"label": case.label, "floor": provider.floor, "elements": case.elements},
        )
        for provider in providers
    ]


def _rates(op: Op, case: Case, milliseconds: float | None, floor: float | None) -> dict[str, float | None]:
    if milliseconds is None:
        return {}
    return {
        "gb_per_s": op.moved_bytes(case) / milliseconds / 1e6,
        "tflops": None if op.flops is None else op.flops(case) / milliseconds / 1e9,
        "percent_of_floor": None if floor is None else 100.0 * floor / milliseconds,
    }


def _record(op: Op, case: Case, provider: str, device: str, **values: object) -> Record:
    work = {"bytes": op.moved_bytes(case), "flops": None if op.flops is None else op.flops(case)}
    return record("kernel", op.name, provider, case.text, case.dtype, device, **work, **values)


def _line(found: Record) -> str:
    if found.ms_p50 is None:
        return f"    {found.provider:18s} {found.error}"
    rate = f"{found.gb_per_s:8.1f} GB/s" if found.tflops is None else f"{found.tflops:8.2f} TFLOP/s"
    percent = "" if found.percent_of_floor is None else f"{found.percent_of_floor:6.0f} % of the floor"
    return f"    {found.provider:18s} {found.ms_p20:9.3f} {found.ms_p50:9.3f} {found.ms_p80:9.3f} ms {rate} {percent}"


if __name__ == "__main__":
    main()
