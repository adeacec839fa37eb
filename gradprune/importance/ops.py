"""The engine's ops by backend. The name fixes the maths; `backend` fixes only who computes it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from gradprune.backends import choose_backend, cpp_fault, triton_fault
from gradprune.config import Backend
from gradprune.importance.reference import linear_importance_reference, taylor_score_reference
from gradprune.importance.vectors import ImportanceVectors


@dataclass(frozen=True)
class Ops:
    """One backend's implementation of every op."""

    backend: str
    taylor_score: Callable[[Tensor, Tensor], ImportanceVectors]
    linear_importance: Callable[[Tensor, Tensor, Tensor], ImportanceVectors]


def taylor_score(w: Tensor, g: Tensor, backend: Backend = "auto") -> ImportanceVectors:
    """Row and column sums of |w g|, w g, w^2 g^2, and the statistics of g, from one read of each.

    Args:
        w: [O, I] floating point, the weight.
        g: [O, I] floating point, its gradient.
        backend: who computes it; "auto" takes the fastest that runs on w's device.

    Raises:
        BackendUnavailableError: the backend asked for cannot run here.
    """
    return select_ops(backend, w.device.type).taylor_score(w, g)


def linear_importance(x: Tensor, dy: Tensor, w: Tensor, backend: Backend = "auto") -> ImportanceVectors:
    """`taylor_score` of every sample's weight gradient dy_n^T x_n, summed over samples; no gradient is kept.

    Args:
        x: [N, T, I] floating point, the linear layer's input.
        dy: [N, T, O] floating point, the gradient of each sample's loss at the layer's output.
        w: [O, I] floating point, the weight.
        backend: who computes it; "auto" takes the fastest that runs on w's device.

    Raises:
        BackendUnavailableError: the backend asked for cannot run here.
    """
    return select_ops(backend, w.device.type).linear_importance(x, dy, w)


@cache
def select_ops(backend: Backend, device: str) -> Ops:
    """The ops of `backend` for tensors on `device` ("cpu", "cuda", ...).

    Only "auto" falls back, and logs why once; a backend asked for by name is used or refused.

    Raises:
        BackendUnavailableError: with the reason.
    """
    return _load(choose_backend(backend, device, "triton" if device == "cuda" else "cpp", unavailable_reason))


def unavailable_reason(backend: Backend, device: str) -> str | None:
    """Why `backend` cannot run on `device`, or None if it can."""
    if backend == "reference":
        return None
    if backend == "cpp":
        return cpp_fault(device)
    if backend == "triton":
        return triton_fault(device)
    return "no importance op has a CUDA C++ kernel; on a GPU use 'triton'"


def _load(backend: str) -> Ops:
    if backend == "reference":
        return Ops(backend, taylor_score_reference, linear_importance_reference)
    if backend == "cpp":
        from gradprune.importance.cpp import linear_importance_cpp, taylor_score_cpp

        return Ops(backend, taylor_score_cpp, linear_importance_cpp)
    from gradprune.importance.triton import linear_importance_triton, taylor_score_triton

    return Ops(backend, taylor_score_triton, linear_importance_triton)
