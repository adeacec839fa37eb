"""Providers and checks that several ops share: floors, torch.compile, and our backends."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.timing import Provider
from gradprune import ops
from gradprune.config import GradientBackend, ImportanceBackend
from gradprune.ops.dispatch import ImportanceOps, gradient_ops_fault, importance_ops_fault, select_ops
from gradprune.ops.vectors import Side

Check = Callable[[Any, tuple[Any, ...]], str | None]


def unchecked(_result: Any, _inputs: tuple[Any, ...]) -> None:
    """Accept anything: the check of a floor, whose result is not the op's."""


def copied(result: tuple[Tensor, Tensor], _inputs: tuple[Any, ...]) -> str | None:
    """Check a copy, which returns (to, source)."""
    to, source = result
    return None if torch.equal(to, source) else "the copy differs from what was copied"


def compiled(function: Callable[..., Any], check: Check, device: str) -> Provider:
    """`function` under torch.compile, as one graph for static shapes; on a GPU its kernels are autotuned."""
    torch._dynamo.reset()
    mode = "max-autotune-no-cudagraphs" if device == "cuda" else None
    return Provider("torch.compile", torch.compile(function, fullgraph=True, dynamic=False, mode=mode), check)


def side_of_gradients(device: str) -> Side:
    """The side to measure for ops that form gradients, so that the work is one product, which is what is counted.

    On a GPU each side takes a product of its own, and the engine asks for one side; on a CPU one product gives both.
    """
    return "rows" if device == "cuda" else "both"


def importance_backends(op: Callable[[ImportanceOps], Callable[..., Any]], check: Check, device: str) -> list[Provider]:
    """Every backend of ours that has kernels for the importance ops on `device`, without the reference (eager)."""
    found = []
    for backend in get_args(ImportanceBackend):
        # On a CPU, Triton would run in its interpreter, whose time means nothing.
        if backend in ("auto", "reference") or (backend == "triton" and device == "cpu"):
            continue
        if importance_ops_fault(backend, device) is None:
            found.append(Provider(f"gradprune {backend}", op(select_ops(backend, device)), check))
    return found


def gradient_backends(name: str, adapt: Callable[..., Any], check: Check, device: str) -> list[Provider]:
    """Every backend of ours for `gradprune.ops.<name>` on `device`, without the reference (eager).

    adapt: called with (op, *inputs), where op is the function with this backend.
    """
    op = getattr(ops, name)
    return [
        Provider(f"gradprune {backend}", partial(adapt, partial(op, backend=backend)), check)
        for backend in get_args(GradientBackend)
        if backend not in ("auto", "reference") and gradient_ops_fault(backend, device) is None
    ]
