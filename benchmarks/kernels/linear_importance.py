"""linear_importance: eager and our backends; the floor is the plain weight gradient, one GEMM over all tokens.

The floor does less: it sums over the samples, so nothing is squared sample by sample, and scores nothing. On a GPU only
row sums are computed, because the engine asks for one side; on a CPU both sides'.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.cases import token_counts
from benchmarks.kernels.op import DTYPES, Case, Op
from benchmarks.kernels.providers import importance_backends, side_of_gradients, unchecked
from benchmarks.kernels.vectors import vectors_check
from benchmarks.timing import Provider
from gradprune.ops.reference import linear_importance_reference


def _inputs(case: Case, number: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = case.shapes[0]
    x = case.random((case.samples, case.tokens, columns), 3 * number, device)
    dy = case.random((case.samples, case.tokens, rows), 3 * number + 1, device)
    return x, dy, case.random((rows, columns), 3 * number + 2, device)


def weight_gradient(x: Tensor, dy: Tensor, _w: Tensor) -> Tensor:
    """The floor: the weight-gradient product of a backward pass, for all samples together."""
    return torch.mm(dy.flatten(0, 1).T, x.flatten(0, 1))


def _weight_gradient_fp32(x: Tensor, dy: Tensor, w: Tensor) -> Tensor:
    return weight_gradient(x.float(), dy.float(), w)


def _providers(case: Case, device: str) -> list[Provider]:
    dtype, side = DTYPES[case.dtype], side_of_gradients(device)
    eager = partial(linear_importance_reference, side=side)
    # A provider may round the gradient to the inputs' type before scoring it, by half a unit in the last place.
    check = vectors_check(eager, torch.finfo(dtype).eps / 2)
    providers = [Provider("torch.mm", weight_gradient, unchecked, floor=True)]
    if device == "cpu" and dtype != torch.float32:
        # CPUs without matrix instructions for 16-bit types multiply faster in fp32; the faster one is the floor.
        providers.append(Provider("torch.mm in fp32", _weight_gradient_fp32, unchecked, floor=True))
    providers.append(Provider("eager", eager, check))
    ours = importance_backends(lambda ops: lambda *inputs: ops.linear_importance(*inputs, side), check, device)
    return providers + ours


def _bytes(case: Case) -> int:
    rows, columns = case.shapes[0]
    return (case.elements + case.samples * case.tokens * (rows + columns)) * case.itemsize


def _flops(case: Case) -> int:
    return 2 * case.samples * case.tokens * case.elements


OP = Op("linear_importance", token_counts, _inputs, _providers, moved_bytes=_bytes, input_bytes=_bytes, flops=_flops)
