"""Find the fastest configuration of `linear_importance` for three numbers of tokens, compared with cuBLAS.

    python -m benchmarks.kernels.sweep --device cuda [--quick]
    python -m benchmarks.kernels.sweep --toy     # Triton's interpreter: each configuration is checked, none is timed

The sweep covers the configurations that the kernel chooses among, marked "chosen from", and others near them. One that
does not compile on the device, or whose result is wrong, is recorded with the reason.
"""

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.kernels.cases import LLAMA_8B
from benchmarks.kernels.linear_importance import OP, weight_gradient
from benchmarks.kernels.op import DTYPES, Case
from benchmarks.kernels.providers import unchecked
from benchmarks.kernels.vectors import vectors_check
from benchmarks.options import parse, parser
from benchmarks.progress import Deadline, say
from benchmarks.results import append, record
from benchmarks.timing import Provider, Timing, free, measure
from gradprune.ops.reference import linear_importance_reference

if TYPE_CHECKING:
    from gradprune.kernels.linear_importance import LinearImportanceConfig

NAME = "linear_importance configurations"
_TOKENS = (2048, 512, 128)
_SAMPLES, _REPEATS, _SECONDS, _PREPARATION = 4, 20, 1.0, 6.0
_UNTIMED = "right, and not timed: Triton's interpreter ran it"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every configuration in every case."""
    options = parse(parser(__doc__), arguments)
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from gradprune.ops.dispatch import importance_ops_fault

    fault = importance_ops_fault("triton", options.device)
    if fault is not None:
        say(f"LEFT OUT: {NAME}, for {fault}")
        return
    deadline = Deadline(options.seconds)
    for case in cases(options.quick, options.toy):
        if deadline.allows(_PREPARATION):
            _sweep(case, options)
        else:
            error = "skipped: the time for this run was used up"
            append(record("kernel", NAME, "all", case.text, case.dtype, options.device, error=error), options.output)


def cases(quick: bool, toy: bool) -> list[Case]:
    """The cases: a square weight and a wide one, the largest number of tokens first."""
    if toy:
        return [Case("toy", ((24, 40),), "bf16", samples=2, tokens=8)]
    parts = ("q",) if quick else ("q", "down")
    return [
        Case(f"Llama-3-8B {part}", (LLAMA_8B[part],), "bf16", samples=_SAMPLES, tokens=tokens)
        for part in parts
        for tokens in _TOKENS
    ]


def candidates(
    rows: int, columns: int, dtype: str, descriptors: bool, from_registers: bool = False
) -> dict[str, "LinearImportanceConfig"]:
    """Configurations by name: first those that the kernel chooses among, then others near the default."""
    from gradprune.kernels.linear_importance import PERSISTENT, configs_for

    chosen = configs_for(rows, columns, DTYPES[dtype], descriptors, from_registers)
    default = chosen[0]
    near = [
        replace(default, GROUP_A=4),
        replace(default, num_stages=2),
        replace(default, BLOCK_T=32, num_stages=4),
        replace(default, num_warps=4, maxnreg=None),
        replace(default, BLOCK_B=2 * default.BLOCK_B, maxnreg=None),
        replace(default, BLOCK_A=2 * default.BLOCK_A, maxnreg=None),
    ]
    if descriptors:
        near.append(PERSISTENT)
    named = {_name(config): config for config in near}
    return {f"{_name(config)}, chosen from": config for config in chosen} | {
        name: config for name, config in named.items() if config not in chosen
    }


def _name(config: "LinearImportanceConfig") -> str:
    tile = f"{config.BLOCK_A}x{config.BLOCK_B}x{config.BLOCK_T}"
    registers = f", {config.maxnreg} registers" if config.maxnreg else ""
    persistent = ", persistent" if config.persistent else ""
    return f"{tile}, {config.num_warps} warps, {config.num_stages} stages, down {config.GROUP_A}{registers}{persistent}"


def _sweep(case: Case, options: Namespace) -> None:
    """Time every configuration in one case (on a CPU, check it); print and append the records."""
    say(f"{NAME}, {case.label} [{case.text}] {case.dtype} on {options.device}")
    providers = [Provider("torch.mm", weight_gradient, unchecked, floor=True), *_providers(case, options.device)]
    found = measure(
        providers,
        lambda number: OP.inputs(case, number, options.device),
        OP.input_bytes(case),
        device=options.device,
        repeats=1 if options.toy else _REPEATS,
        seconds=_SECONDS,
    )
    flops, floor = 2 * case.samples * case.tokens * case.elements, found["torch.mm"].p50
    for provider in providers:
        timing = found[provider.name]
        if options.device == "cpu" and not provider.floor and timing.error is None:
            timing = Timing.failed(_UNTIMED)
        rates = {} if timing.p50 is None or floor is None else {
            "tflops": flops / timing.p50 / 1e9, "percent_of_floor": 100.0 * floor / timing.p50
        }  # fmt: skip
        extra = {"label": case.label, "floor": provider.floor}
        made = record(
            "kernel", NAME, provider.name, case.text, case.dtype, options.device, flops=flops, extra=extra, **rates,
            **timing.values(),
        )  # fmt: skip
        append(made, options.output)
        shown = timing.error if made.tflops is None else f"{made.tflops:7.1f} TFLOP/s {made.percent_of_floor:5.0f} %"
        say(f"    {provider.name:60s} {shown}")
    free(options.device)


def _providers(case: Case, device: str) -> list[Provider]:
    """A provider for each configuration, with row sums: the side of all projections except output projections."""
    from gradprune.kernels.linear_importance import descriptors_work, multiplies_from_registers

    described = descriptors_work(*OP.inputs(case, 0, device))
    from_registers = multiplies_from_registers(torch.device(device))
    check = vectors_check(partial(linear_importance_reference, side="rows"))
    return [
        Provider(name, _scored_by(config), check)
        for name, config in candidates(*case.shapes[0], case.dtype, described, from_registers).items()
    ]


def _scored_by(config: "LinearImportanceConfig") -> Callable[[Tensor, Tensor, Tensor], object]:
    from gradprune.kernels.linear_importance import linear_importance_triton
    from gradprune.ops.triton import vectors

    return lambda x, dy, w: vectors(linear_importance_triton(x, dy, w, columns=False, config=config), None)


if __name__ == "__main__":
    main()
