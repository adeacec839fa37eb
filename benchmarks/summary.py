"""README.md's "How fast, how small, how good": the few figures that answer it, each from a record."""

from collections.abc import Sequence
from statistics import fmean

from benchmarks import tables
from benchmarks.jobs.calibrators import RECOMPUTING
from benchmarks.results import ANY_HARDWARE, Record

_QUALITY = "Held-out perplexity, mean of {} seed(s); where there are two figures, without / with H-GSP:"
_PEERS = ("plain", "torch-pruning GroupTaylor", "torch-pruning GroupHessian", "naive", "torch.func")


def summary(records: Sequence[Record]) -> str:
    """The section's text: by hardware the ops, the calibration and inference; then quality by model."""
    parts = []
    for hardware, of_one in by_hardware(records).items():
        revisions = ", ".join(sorted({f"`{found.environment.revision}`" for found in of_one}))
        sections = [made(of_one) for made in (_ops, _calibration, _inference, _quality, _vanishing)]
        text = "\n\n".join(section for section in sections if section)
        if text:
            parts.append(f"On {hardware} (torch {of_one[0].environment.torch}; revision {revisions}):\n\n{text}")
    link = "All tables and plots, and how it is measured: [benchmarks](benchmarks/README.md)."
    return "\n\n".join([*parts, link] if parts else ["Nothing has been measured yet.", link])


def by_hardware(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by what they depend on; those that do not depend on hardware come last."""
    groups = tables.grouped(records, lambda found: found.hardware)
    return dict(sorted(groups.items(), key=lambda group: group[0] == ANY_HARDWARE))


def _ops(records: Sequence[Record]) -> str:
    """By op and element type one case, the best of ours beside the floor, eager and torch.compile.

    The largest of those that torch.compile took part in; without any, the largest.
    """
    rows = []
    kernels = [found for found in records if found.kind == "kernel"]
    for (name, dtype), group in tables.grouped(kernels, lambda found: (found.name, found.dtype)).items():
        cases = list(tables.grouped(group, lambda found: found.shape).values())
        timed = [(case, _best_of_ours(case)) for case in cases]
        timed = [(case, ours) for case, ours in timed if ours is not None]
        if not timed:
            continue
        case, ours = max(
            timed, key=lambda pair: (_time(pair[0], "torch.compile") is not None, pair[1].flops or pair[1].bytes or 0)
        )
        rows.append(
            [
                f"`{name}` {dtype}, {ours.extra.get('label', '')} {ours.shape}",
                ours.provider.removeprefix("gradprune "),
                f"{ours.tflops:.2f} TFLOP/s" if ours.tflops is not None else f"{ours.gb_per_s:.1f} GB/s",
                "-" if ours.percent_of_floor is None else f"{ours.percent_of_floor:.0f} %",
                *(tables.ratio(_time(case, peer), ours.ms_p50) for peer in ("eager", "torch.compile", "foreach")),
            ]
        )
    if not rows:
        return ""
    header = ["op", "backend", "rate", "of floor", "x eager", "x torch.compile", "x foreach"]
    return tables.table(header, rows)


def _calibration(records: Sequence[Record]) -> str:
    """By model the best of ours, then everyone's time and memory beside it."""
    rows = []
    jobs = [found for found in records if found.kind == "job" and found.name == "calibration"]
    for shape, group in tables.grouped(jobs, lambda found: found.shape).items():
        ours = _best_of_ours(group)
        if ours is None:
            continue
        others = (f"{ours.provider}{RECOMPUTING}", *_PEERS)
        for found in (ours, *(one for other in others for one in group if one.provider == other)):
            rows.append(
                [
                    f"{shape}, {ours.dtype}",
                    found.provider,
                    tables.ratio(found.ms_p50, ours.ms_p50) if found.ms_p50 else (found.error or "-").split(":")[0],
                    tables.ratio(found.peak_memory, ours.peak_memory),
                    tables.above_activations(found, group),
                ]
            )
    if not rows:
        return ""
    header = ["calibration and importance", "who", "time, x ours", "peak memory, x ours"]
    return tables.table([*header, "beyond activations, of the weights"], rows)


def _inference(records: Sequence[Record]) -> str:
    """How many times as fast as the dense model, by rounding."""
    chosen = [found for found in records if found.kind == "inference" and found.provider != "dense"]
    dense = {found.work: found for found in records if found.kind == "inference" and found.provider == "dense"}
    providers = list(dict.fromkeys(found.provider for found in chosen))
    rows = []
    for work in dict.fromkeys(found.work for found in chosen):
        base = dense.get(work)
        of_work = {found.provider: found for found in chosen if found.work == work}
        cells = [tables.ratio(base and base.ms_p50, of_work[p].ms_p50) if p in of_work else "-" for p in providers]
        rows.append([f"{work[2]}, {work[3]}", *cells])
    if not rows:
        return ""
    removed = next(iter(chosen)).extra.get("ratio", 0.0)
    return tables.table([f"speed with {removed:.0%} removed, x dense", *providers], rows)


def _quality(records: Sequence[Record]) -> str:
    """By model the mean perplexity of every provider and ratio, the lowest of a ratio in bold."""
    parts = []
    measured = [found for found in records if found.kind == "quality" and found.provider != "dense"]
    measured = [found for found in measured if "perplexity" in found.extra]
    for model, group in tables.grouped(measured, lambda found: found.name).items():
        ratios = sorted({found.extra["ratio"] for found in group})
        means = {
            key: fmean(found.extra["perplexity"] for found in seeds)
            for key, seeds in tables.grouped(group, lambda found: (found.provider, found.extra["ratio"])).items()
        }
        rows = []
        for name, providers in _by_temperature(group).items():
            cells = []
            for ratio in ratios:
                best = min(value for key, value in means.items() if key[1] == ratio)
                values = [means[provider, ratio] for provider in providers if (provider, ratio) in means]
                cells.append(" / ".join(f"**{v:.2f}**" if v == best else f"{v:.2f}" for v in values) or "-")
            rows.append([name, *cells])
        seeds = len({found.extra["seed"] for found in group})
        header = [f"{model}, dense {group[0].extra['perplexity_dense']:.2f}", *(f"{r:.0%} removed" for r in ratios)]
        parts.append(f"{_QUALITY.format(seeds)}\n\n{tables.table(header, rows)}")
    return "\n\n".join(parts)


def _vanishing(records: Sequence[Record]) -> str:
    """Repairs of vanishing gradients, where they help and where they harm."""
    chosen = [found for found in records if found.kind == "vanishing"]
    return f"{tables.VANISHING.format(chosen[0].shape)}\n\n{tables.vanishing_table(chosen)}" if chosen else ""


def _by_temperature(records: Sequence[Record]) -> dict[str, list[str]]:
    """Providers that differ in the temperature only, by what they have in common, temperatures ascending."""
    providers = dict.fromkeys(found.provider for found in records)
    by_name: dict[str, list[str]] = {}
    for provider in providers:
        by_name.setdefault(provider.split(" T=")[0], []).append(provider)
    return {name: sorted(of_name) for name, of_name in by_name.items()}


def _best_of_ours(records: Sequence[Record]) -> Record | None:
    ours = [found for found in records if found.provider.startswith("gradprune") and found.ms_p50 is not None]
    return min(ours, key=lambda found: found.ms_p50 or 0.0, default=None)


def _time(records: Sequence[Record], provider: str) -> float | None:
    return next((found.ms_p50 for found in records if found.provider == provider), None)
