"""The engine's ops by backend. The name fixes the maths; `backend` fixes only who computes it."""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from gradprune.config import Backend
from gradprune.errors import BackendUnavailableError
from gradprune.importance.reference import linear_importance_reference, taylor_score_reference
from gradprune.importance.vectors import ImportanceVectors

logger = logging.getLogger(__name__)


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
    if backend != "auto":
        reason = unavailable_reason(backend, device)
        if reason is not None:
            raise BackendUnavailableError(f"backend: '{backend}' cannot run on {device}: {reason}")
        return _load(backend)
    preferred: Backend = "triton" if device == "cuda" else "cpp"
    reason = unavailable_reason(preferred, device)
    if reason is None:
        return _load(preferred)
    logger.info("backend 'auto' uses 'reference' on %s: '%s' cannot run: %s", device, preferred, reason)
    return _load("reference")


def unavailable_reason(backend: Backend, device: str) -> str | None:
    """Why `backend` cannot run on `device`, or None if it can."""
    if backend == "reference":
        return None
    if backend == "cpp":
        if device != "cpu":
            return "the C++ kernels work on CPU tensors"
        return extension_fault()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install 'gradprune[triton]')"
        if device == "cuda" or _triton_interpreted():
            return None
        return "it needs a CUDA device (or TRITON_INTERPRET=1, to check kernels on the CPU)"
    return "no importance op has a CUDA C++ kernel; on a GPU use 'triton'"


def extension_fault() -> str | None:
    """Why the C++ kernels cannot run here, or None if they can."""
    try:
        importlib.import_module("gradprune._C")
    except ImportError as error:
        return f"the extension gradprune._C does not import: {error} (reinstall gradprune with a C++ compiler)"
    return None


def _triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _load(backend: str) -> Ops:
    if backend == "reference":
        return Ops(backend, taylor_score_reference, linear_importance_reference)
    if backend == "cpp":
        from gradprune.importance.cpp import linear_importance_cpp, taylor_score_cpp

        return Ops(backend, taylor_score_cpp, linear_importance_cpp)
    from gradprune.importance.triton import linear_importance_triton, taylor_score_triton

    return Ops(backend, taylor_score_triton, linear_importance_triton)
