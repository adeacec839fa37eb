"""The gradient ops by backend. The name fixes the maths; `backend` fixes only who computes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from gradprune.backends import choose_backend, cpp_fault, cuda_fault
from gradprune.config import Backend
from gradprune.gradients.reference import grad_stats_reference, scale_gradients_reference


@dataclass(frozen=True)
class GradientOps:
    """One backend's implementation of every gradient op."""

    backend: str
    grad_stats: Callable[[Sequence[Tensor]], Tensor]
    scale_gradients: Callable[[Sequence[Tensor], Sequence[float]], None]


def grad_stats(grads: Sequence[Tensor], backend: Backend = "auto") -> Tensor:
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


def scale_gradients(grads: Sequence[Tensor], scales: Sequence[float], backend: Backend = "auto") -> None:
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
def select_gradient_ops(backend: Backend, device: str) -> GradientOps:
    """The gradient ops of `backend` for tensors on `device` ("cpu", "cuda", ...).

    Only "auto" falls back, and logs why once; a backend asked for by name is used or refused.

    Raises:
        BackendUnavailableError: with the reason.
    """
    return _load(choose_backend(backend, device, "cuda" if device == "cuda" else "cpp", gradient_ops_fault))


def gradient_ops_fault(backend: Backend, device: str) -> str | None:
    """Why `backend` cannot run the gradient ops on `device`, or None if it can."""
    if backend == "reference":
        return None
    if backend == "cpp":
        return cpp_fault(device)
    if backend == "cuda":
        return cuda_fault(device)
    return "no gradient op has a Triton kernel; on a GPU use 'cuda'"


def _device(grads: Sequence[Tensor], backend: Backend) -> str:
    """The type of the gradients' device; with no gradients, one that `backend` works on."""
    devices = {grad.device for grad in grads}
    if len(devices) > 1:
        raise ValueError(f"grads: are on {', '.join(sorted(map(str, devices)))}; one call, one device")
    return devices.pop().type if devices else ("cuda" if backend == "cuda" else "cpu")


def _load(backend: str) -> GradientOps:
    if backend == "reference":
        return GradientOps(backend, grad_stats_reference, scale_gradients_reference)
    if backend == "cpp":
        from gradprune.gradients.cpp import grad_stats_cpp, scale_gradients_cpp

        return GradientOps(backend, grad_stats_cpp, scale_gradients_cpp)
    from gradprune.gradients.cuda import grad_stats_cuda, scale_gradients_cuda

    return GradientOps(backend, grad_stats_cuda, scale_gradients_cuda)
