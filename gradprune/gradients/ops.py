"""The gradient ops by backend: statistics and scaling of all gradients of a model, in one call each."""

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from gradprune.config import Backend
from gradprune.errors import BackendUnavailableError
from gradprune.gradients.cpp import grad_stats_cpp, scale_gradients_cpp
from gradprune.gradients.cuda import built_with_cuda, grad_stats_cuda, scale_gradients_cuda
from gradprune.importance.ops import extension_fault
from gradprune.importance.reference import grad_stats_reference

logger = logging.getLogger(__name__)


def grad_stats(grads: Sequence[Tensor], backend: Backend = "auto") -> Tensor:
    """Statistics of each gradient.

    Args:
        grads: K tensors of any shape on one device, floating point.
        backend: who computes it; "auto" takes the fastest that runs on their device.

    Returns:
        [K, 5] fp64: sum|g|, sum g^2, max|g|, min|g|, number of non-finite elements (in none of the other four).

    Raises:
        BackendUnavailableError: the backend asked for cannot run here.
    """
    chosen = _select(backend, _device(grads))
    if not grads:
        return torch.empty(0, 5, dtype=torch.float64)
    if chosen == "cpp":
        return grad_stats_cpp(grads)
    if chosen == "cuda":
        return grad_stats_cuda(grads)
    return torch.stack([grad_stats_reference(grad).double() for grad in grads])


def scale_gradients(grads: Sequence[Tensor], scales: Sequence[float], backend: Backend = "auto") -> None:
    """grads[k] <- grads[k] * scales[k], in place.

    Args:
        grads: K tensors of any shape on one device, floating point, that share no memory.
        scales: K numbers; a gradient whose scale is 1 is not touched.
        backend: who computes it; "auto" takes the fastest that runs on their device.

    Raises:
        BackendUnavailableError: the backend asked for cannot run here.
        ValueError: the lengths differ.
    """
    if len(grads) != len(scales):
        raise ValueError(f"scales: has {len(scales)} entries for {len(grads)} gradients; one for each is needed")
    chosen = _select(backend, _device(grads))
    if not grads:
        return
    if chosen == "cpp":
        scale_gradients_cpp(grads, scales)
    elif chosen == "cuda":
        scale_gradients_cuda(grads, scales)
    else:
        _scale_gradients_reference(grads, scales)


def unavailable_reason(backend: Backend, device: str) -> str | None:
    """Why `backend` cannot run the gradient ops on `device`, or None if it can."""
    if backend in ("reference", "auto"):
        return None
    if backend == "cpp":
        return "the C++ kernels work on CPU tensors" if device != "cpu" else extension_fault()
    if backend == "cuda":
        if device != "cuda":
            return "the CUDA kernels work on CUDA tensors"
        return None if built_with_cuda() else "the extension was built without a CUDA compiler"
    return "the gradient ops have no Triton kernel"


@torch.no_grad()
def _scale_gradients_reference(grads: Sequence[Tensor], scales: Sequence[float]) -> None:
    for grad, scale in zip(grads, scales, strict=True):
        if scale != 1.0:
            grad.mul_(scale)


def _device(grads: Sequence[Tensor]) -> str:
    return grads[0].device.type if grads else "cpu"


@cache
def _select(backend: Backend, device: str) -> Backend:
    """The backend to use; only "auto" falls back, and logs why once."""
    wanted: Backend = backend if backend != "auto" else "cuda" if device == "cuda" else "cpp"
    reason = unavailable_reason(wanted, device)
    if reason is None:
        return wanted
    if backend != "auto":
        raise BackendUnavailableError(f"backend: '{backend}' cannot run on {device}: {reason}")
    logger.info("backend 'auto' uses 'reference' on %s: '%s' cannot run: %s", device, wanted, reason)
    return "reference"
