"""The engine's ops by backend. The name fixes the maths; `backend` fixes only who computes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import get_args

from torch import Tensor

from gradprune.config import GradientBackend, ImportanceBackend
from gradprune.ops.backends import choose_backend, cpp_fault, cuda_fault, no_kernel, triton_fault
from gradprune.ops.reference import (
    grad_stats_reference,
    linear_importance_reference,
    scale_gradients_reference,
    taylor_score_reference,
)
from gradprune.ops.vectors import ImportanceVectors


@dataclass(frozen=True)
class Ops:
    """One backend's implementation of every op."""

    backend: str
    taylor_score: Callable[[Tensor, Tensor], ImportanceVectors]
    linear_importance: Callable[[Tensor, Tensor, Tensor], ImportanceVectors]


def taylor_score(w: Tensor, g: Tensor, backend: ImportanceBackend = "auto") -> ImportanceVectors:
    """Row and column sums of |w g|, w g, w^2 g^2, and the statistics of g, from one read of each.

    Args:
        w: [O, I] floating point, the weight.
        g: [O, I] floating point, its gradient.
        backend: who computes it; "auto" takes the fastest that runs on w's device.

    Raises:
        BackendUnavailableError: the backend asked for cannot run here.
    """
    return select_ops(backend, w.device.type).taylor_score(w, g)


def linear_importance(x: Tensor, dy: Tensor, w: Tensor, backend: ImportanceBackend = "auto") -> ImportanceVectors:
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
def select_ops(backend: ImportanceBackend, device: str) -> Ops:
    """The ops of `backend` for tensors on `device` ("cpu", "cuda", ...).

    Only "auto" falls back, and logs why once; a backend asked for by name is used or refused.

    Raises:
        BackendUnavailableError: with the reason.
    """
    return _load(choose_backend(backend, device, "triton" if device == "cuda" else "cpp", unavailable_reason))


def unavailable_reason(backend: ImportanceBackend, device: str) -> str | None:
    """Why `backend` cannot run on `device`, or None if it can."""
    if backend == "reference":
        return None
    if backend == "cpp":
        return cpp_fault(device)
    if backend == "triton":
        return triton_fault(device)
    return no_kernel("importance", backend, get_args(ImportanceBackend))


def _load(backend: str) -> Ops:
    if backend == "reference":
        return Ops(backend, taylor_score_reference, linear_importance_reference)
    if backend == "cpp":
        from gradprune.ops.cpp import linear_importance_cpp, taylor_score_cpp

        return Ops(backend, taylor_score_cpp, linear_importance_cpp)
    from gradprune.ops.triton import linear_importance_triton, taylor_score_triton

    return Ops(backend, taylor_score_triton, linear_importance_triton)


@dataclass(frozen=True)
class GradientOps:
    """One backend's implementation of every gradient op."""

    backend: str
    grad_stats: Callable[[Sequence[Tensor]], Tensor]
    scale_gradients: Callable[[Sequence[Tensor], Sequence[float]], None]


def grad_stats(grads: Sequence[Tensor], backend: GradientBackend = "auto") -> Tensor:
    """Statistics of each gradient, from one read of all of them.

    Args:
        grads: K floating-point tensors of any shape on one device.
        backend: who computes it; "auto" takes the fastest that runs on the gradients' device.

    Returns:
        [K, 5] fp64 on the gradients' device: sum|g|, sum g^2, max|g|, min|g|, number of non-finite elements (which
        enter none of the other four). An empty gradient has max|g| = 0 and min|g| = inf.

    Raises:
        BackendUnavailableError: the backend asked for cannot run here.
        ValueError: the gradients are not on one device, or `backend` cannot read one of them.
    """
    return select_gradient_ops(backend, _device(grads, backend)).grad_stats(grads)


def scale_gradients(grads: Sequence[Tensor], scales: Sequence[float], backend: GradientBackend = "auto") -> None:
    """grads[k] <- grads[k] * scales[k], in place; a gradient whose scale is 1 is not touched.

    Args:
        grads: K floating-point tensors of any shape on one device, that share no memory.
        scales: K numbers.
        backend: who computes it; "auto" takes the fastest that runs on the gradients' device.

    Raises:
        BackendUnavailableError: the backend asked for cannot run here.
        ValueError: the lengths differ, the gradients are not on one device, or `backend` cannot scale one of them.
    """
    select_gradient_ops(backend, _device(grads, backend)).scale_gradients(grads, scales)


@cache
def select_gradient_ops(backend: GradientBackend, device: str) -> GradientOps:
    """The gradient ops of `backend` for tensors on `device` ("cpu", "cuda", ...).

    Only "auto" falls back, and logs why once; a backend asked for by name is used or refused.

    Raises:
        BackendUnavailableError: with the reason.
    """
    return _load_gradient_ops(
        choose_backend(backend, device, "cuda" if device == "cuda" else "cpp", gradient_ops_fault)
    )


def gradient_ops_fault(backend: GradientBackend, device: str) -> str | None:
    """Why `backend` cannot run the gradient ops on `device`, or None if it can."""
    if backend == "reference":
        return None
    if backend == "cpp":
        return cpp_fault(device)
    if backend == "cuda":
        return cuda_fault(device)
    return no_kernel("gradient", backend, get_args(GradientBackend))


def _device(grads: Sequence[Tensor], backend: GradientBackend) -> str:
    """The type of the gradients' device; with no gradients, one that `backend` works on."""
    devices = {grad.device for grad in grads}
    if len(devices) > 1:
        raise ValueError(f"grads: are on {', '.join(sorted(map(str, devices)))}; one call, one device")
    return devices.pop().type if devices else ("cuda" if backend == "cuda" else "cpu")


def _load_gradient_ops(backend: str) -> GradientOps:
    if backend == "reference":
        return GradientOps(backend, grad_stats_reference, scale_gradients_reference)
    if backend == "cpp":
        from gradprune.ops.cpp import grad_stats_cpp, scale_gradients_cpp

        return GradientOps(backend, grad_stats_cpp, scale_gradients_cpp)
    from gradprune.ops.cuda import grad_stats_cuda, scale_gradients_cuda

    return GradientOps(backend, grad_stats_cuda, scale_gradients_cuda)
