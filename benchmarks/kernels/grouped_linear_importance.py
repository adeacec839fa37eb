"""grouped_linear_importance: eager and our backends; the floor is the plain weight gradient, one GEMM per expert.

As for linear_importance, the floor does less than the op, and a GPU computes row sums, a CPU those of both sides.
Tokens are sent to experts at random.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.op import DTYPES, Case, Op
from benchmarks.kernels.providers import importance_backends, side_of_gradients, unchecked
from benchmarks.kernels.vectors import vectors_fault
from benchmarks.timing import Provider
from gradprune.ops.dispatch import ImportanceOps
from gradprune.ops.reference import grouped_linear_importance_reference
from gradprune.ops.vectors import GradientStatistics, GroupedVectors, ImportanceVectors

_FP32_SUM = 1e-5


def cases(device: str, size: str) -> list[Case]:
    """The experts of a layer of Qwen3-30B-A3B (all on a GPU, eight on a CPU), or of a toy model."""
    if size == "toy":
        return [Case("toy", ((3, 24, 40),), dtype, samples=2, tokens=20) for dtype in ("fp32", "bf16")]
    experts, tokens = (128, 4096) if device == "cuda" else (8, 256)
    shapes = {"gate_up": (experts, 1536, 2048), "down": (experts, 2048, 768)}
    return [
        Case(f"Qwen3-30B-A3B {name}", (shape,), dtype, samples=4, tokens=tokens)
        for dtype in (("bf16", "fp32") if device == "cuda" else ("fp32", "bf16"))
        for name, shape in shapes.items()
    ]


def _inputs(case: Case, number: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, dy, w and offsets for `tokens` rows of each sample, spread over the experts, and the offsets on the host.

    Providers that need numbers take the offsets on the host, because reading them from a GPU would wait for it and
    interrupt the enqueueing of launches.
    """
    experts, rows, columns = case.shapes[0]
    generator = torch.Generator().manual_seed(number)
    chosen = torch.randint(experts, (case.samples, case.tokens), generator=generator)
    of_rows = chosen * case.samples + torch.arange(case.samples)[:, None]
    counts = torch.bincount(of_rows.flatten(), minlength=experts * case.samples)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    x = case.random((case.samples * case.tokens, columns), 3 * number, device)
    dy = case.random((case.samples * case.tokens, rows), 3 * number + 1, device)
    return x, dy, case.random(case.shapes[0], 3 * number + 2, device), offsets.to(device), offsets


def weight_gradients(x: Tensor, dy: Tensor, w: Tensor, _offsets: Tensor, of_host: Tensor) -> list[Tensor]:
    """The floor: the weight-gradient product of a backward pass, expert by expert."""
    samples = (len(of_host) - 1) // len(w)
    counts = of_host[::samples].diff().tolist()
    parts = zip(dy.split(counts), x.split(counts), strict=True)
    return [torch.mm(of_dy.T, of_x) for of_dy, of_x in parts]


def _check(reference: Callable[..., GroupedVectors], epsilon: float) -> Callable[[Any, tuple[Any, ...]], str | None]:
    """A provider's check of `GroupedVectors`.

    reference: the op's reference; it is called with the inputs in fp64.
    epsilon: relative rounding error of the gradient's elements.
    """
    expected: list[GroupedVectors] = []

    def check(found: GroupedVectors, inputs: tuple[Any, ...]) -> str | None:
        *values, offsets, of_host = inputs
        if not expected:
            expected.append(reference(*(value.double() for value in values), offsets, of_host))
        pairs = zip(_by_expert(found), _by_expert(expected[0]), strict=True)
        faults = (vectors_fault(have, want, _FP32_SUM + epsilon) for have, want in pairs)
        return next((fault for fault in faults if fault is not None), None)

    return check


def _by_expert(found: GroupedVectors) -> list[ImportanceVectors]:
    rows, columns = (
        [None] * len(found.statistics.sum_abs) if sums is None else list(sums) for sums in (found.rows, found.columns)
    )
    parts = zip(rows, columns, found.statistics.pack(), strict=True)
    return [ImportanceVectors(*sums, GradientStatistics.unpack(own)) for *sums, own in parts]


def _providers(case: Case, device: str) -> list[Provider]:
    side = side_of_gradients(device)

    def eager(x: Tensor, dy: Tensor, w: Tensor, _offsets: Tensor, of_host: Tensor) -> GroupedVectors:
        return grouped_linear_importance_reference(x, dy, w, of_host, side)

    def ours(ops: ImportanceOps) -> Callable[..., GroupedVectors]:
        return lambda *inputs: ops.grouped_linear_importance(*inputs[:4], side)

    check = _check(eager, torch.finfo(DTYPES[case.dtype]).eps / 2)
    providers = [
        Provider("torch.mm by expert", weight_gradients, unchecked, floor=True),
        Provider("eager", eager, check),
    ]
    return providers + importance_backends(ours, check, device)


def _bytes(case: Case) -> int:
    _, rows, columns = case.shapes[0]
    return (case.elements + case.samples * case.tokens * (rows + columns)) * case.itemsize


def _flops(case: Case) -> int:
    _, rows, columns = case.shapes[0]
    return 2 * case.samples * case.tokens * rows * columns


OP = Op("grouped_linear_importance", cases, _inputs, _providers, moved_bytes=_bytes, input_bytes=_bytes, flops=_flops)
