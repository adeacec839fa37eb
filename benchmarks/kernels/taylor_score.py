"""taylor_score: the eager formula, the same under torch.compile, and our backends; the floor copies the same bytes."""

from torch import Tensor

from benchmarks.kernels.cases import matrices
from benchmarks.kernels.op import Case, Op
from benchmarks.kernels.providers import compiled, copied, importance_backends
from benchmarks.kernels.vectors import vectors_check
from benchmarks.timing import Provider
from gradprune.ops.reference import taylor_score_reference


def _inputs(case: Case, number: int, device: str) -> tuple[Tensor, Tensor]:
    shape = case.shapes[0]
    return case.random(shape, 2 * number, device), case.random(shape, 2 * number + 1, device)


def _copy(w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Copy W to G, which moves as many bytes as reading both; for timing, the copy is as good a gradient as G."""
    return g.copy_(w), w


def _providers(case: Case, device: str) -> list[Provider]:
    check = vectors_check(taylor_score_reference)
    providers = [Provider("copy", _copy, copied, floor=True), Provider("eager", taylor_score_reference, check)]
    if case.compiled:
        providers.append(compiled(taylor_score_reference, check, device))
    return providers + importance_backends(lambda ops: ops.taylor_score, check, device)


def _bytes(case: Case) -> int:
    return 2 * case.elements * case.itemsize


OP = Op("taylor_score", matrices, _inputs, _providers, moved_bytes=_bytes, input_bytes=_bytes)
