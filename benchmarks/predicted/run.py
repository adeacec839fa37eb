"""Predict the time that GPUs would take, from counts that need none, for comparison with measurements on them.

    python -m benchmarks.predicted.run                   # seconds of ops and of the whole job's passes, on each card
    python -m benchmarks.predicted.run --compiled        # and resources of the compiled Triton kernels; takes minutes

Predictions are recorded as such, under the names of the cases that `make gpu` measures; `benchmarks.predicted.roofline`
states their assumptions. Nothing is timed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.environment import ROOT
from benchmarks.kernels import linear_importance, mask_gradient, taylor_score
from benchmarks.kernels.op import Case, Op
from benchmarks.options import parser
from benchmarks.predicted.counted import Launch
from benchmarks.predicted.jobs import OURS, passes, predicted, streamed
from benchmarks.predicted.roofline import CARDS, Card, launch_seconds
from benchmarks.progress import say
from benchmarks.results import Record, append

_MODEL = "Llama-3-8B"
_OPS = (linear_importance.OP, mask_gradient.OP, taylor_score.OP)
# The Triton version that GPU machines have, installed beside the newest one.
_OTHER_TRITON = ROOT / ".venv" / "triton-3.6.0"
_OF_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
_THREADS = {80: 2048, 90: 2048, 100: 2048, 120: 1536}
_REGISTERS, _BLOCK_RESERVE = 65536, 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Make and record the predictions."""
    made = parser(__doc__)
    made.add_argument("--compiled", action="store_true", help="compile the kernels for devices that are not here")
    options = made.parse_args(arguments)
    for card in CARDS:
        for found in (*ops(card, options.toy), *passes(card, options.toy), streamed(card)):
            append(found, options.output)
            say(f"{card.name}: {found.name} {found.provider} [{found.shape}] {found.ms_p50:.3f} ms predicted")
    if options.compiled:
        for found in compiled():
            append(found, options.output)


def ops(card: Card, toy: bool) -> Iterator[Record]:
    """Predict our kernels, and cuBLAS as the floor of `linear_importance`, in the bf16 cases of one model."""
    for op in _OPS:
        for case in op.cases("cuda", "toy" if toy else "full"):
            if case.dtype == "bf16" and case.label.startswith((_MODEL, "toy")):
                yield _of_op(card, op, case, OURS, f"triton {op.name}")
                if op is linear_importance.OP:
                    yield _of_op(card, op, case, "torch.mm", "floor")


def _of_op(card: Card, op: Op, case: Case, provider: str, kernel: str) -> Record:
    flops = 0 if op.flops is None else op.flops(case)
    launch = Launch(kernel, op.moved_bytes(case), flops, torch.bfloat16, case.samples, case.tokens)
    extra = {"of": "kernel", "label": case.label}
    return predicted("predicted", op.name, provider, case.text, 1e3 * launch_seconds(launch, card), card.name, extra)


def compiled() -> Iterator[Record]:
    """Resources and instructions of the kernels, by each installed Triton version and for each compute capability."""
    for path in ([ROOT], [_OTHER_TRITON, ROOT] if _OTHER_TRITON.is_dir() else []):
        if not path:
            say(f"LEFT OUT: the kernels by Triton 3.6.0, for it is not at {_OTHER_TRITON}")
            continue
        for line in _compile(path).splitlines():
            yield _of_kernel(json.loads(line))


def _compile(path: Sequence[Path]) -> str:
    """Run `compile_kernels.py` with the Triton that comes first on the path, and return its output."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    variables.pop("TRITON_INTERPRET", None)
    program = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, "-W", "ignore", str(program)]
    return subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True).stdout


def _of_kernel(entry: dict[str, int | str | bool]) -> Record:
    capability, warps = int(entry["capability"]), int(entry["warps"])
    blocks = min(
        _OF_SM[capability] // (int(entry["shared"]) + _BLOCK_RESERVE),
        _REGISTERS // (int(entry["registers"]) * warps * 32),
        _THREADS[capability] // (warps * 32),
    )
    elements = int(entry["elements"])
    counts = {name: int(entry[name]) / elements for name in ("loop", "epilogue")} if elements else {}
    extra = {
        "registers": entry["registers"], "stack": entry["stack"], "shared": entry["shared"], "blocks": blocks,
        "wgmma": entry.get("wgmma"), "loop_barriers": entry.get("loop_barriers"), **counts,
    }  # fmt: skip
    shape = f"sm_{capability}, Triton {entry['triton']}"
    made = predicted("compiled", "compiled", str(entry["name"]), shape, None, f"sm_{capability}", extra)
    return replace(made, dtype=str(entry["dtype"]))


if __name__ == "__main__":
    main()
