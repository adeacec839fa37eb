"""The oracle of the gradient ops, in plain PyTorch. Runs anywhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradprune.importance.reference import grad_stats_reference as one_gradient_reference


def grad_stats_reference(grads: Sequence[Tensor]) -> Tensor:
    """[K, 5] fp64 statistics of K gradients: sum|g|, sum g^2, max|g|, min|g|, number of non-finite elements.

    Non-finite elements enter none of the first four. Accumulates in fp32, in fp64 where g is fp64. Deterministic.
    """
    if not grads:
        return torch.empty(0, 5, dtype=torch.float64)
    return torch.stack([one_gradient_reference(grad.detach()).double() for grad in grads])


def scale_gradients_reference(grads: Sequence[Tensor], scales: Sequence[float]) -> None:
    """grads[k] <- grads[k] * scales[k], in place; a gradient whose scale is 1 is not touched.

    The product in fp32 (fp64 for fp64), rounded to nearest even.

    Raises:
        ValueError: the lengths differ.
    """
    if len(grads) != len(scales):
        raise ValueError(f"scales: has {len(scales)} entries for {len(grads)} gradients; one for each is needed")
    for grad, scale in zip(grads, scales, strict=True):
        if scale != 1.0:
            grad.detach().mul_(scale)
