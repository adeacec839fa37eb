"""The ops as users call them, and for each family of ops the backends that can compute them.

An op's name determines what is computed, and `backend` only by what. A backend that is requested by name is used
or refused; only "auto" falls back to another one, and logs the reason once.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gradprune.config import GradientBackend, ImportanceBackend
from gradprune.errors import BackendUnavailableError
from gradprune.ops.backends import cpp_fault, cuda_fault, reference_fault, triton_fault
from gradprune.ops.reference import (
    grad_stats_reference,
    grouped_linear_importance_reference,
    linear_importance_reference,
    mask_gradient_reference,
    scale_gradients_reference,
    taylor_score_reference,
)
from gradprune.ops.removals import Removals, cheapest_removals_reference
from gradprune.ops.vectors import GradientStatistics, GroupedVectors, ImportanceVectors, MaskGradient, Side

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportanceOps:
    """One backend's importance ops.

    linear_importance_uncounted: like `linear_importance`, but instead of being counted, non-finite elements of a
        gradient may make the sums among the statistics non-finite. Counting them costs one more launch per weight.
    """

    backend: str
    taylor_score: Callable[[Tensor, Tensor, Side], ImportanceVectors]
    linear_importance: Callable[[Tensor, Tensor, Tensor, Side], ImportanceVectors]
    linear_importance_uncounted: Callable[[Tensor, Tensor, Tensor, Side], ImportanceVectors]
    grouped_linear_importance: Callable[[Tensor, Tensor, Tensor, Tensor, Side], GroupedVectors]
    mask_gradient: Callable[[Tensor, Tensor], MaskGradient]
    cheapest_removals: Callable[[Tensor, Tensor, int, int], Removals]


@dataclass(frozen=True)
class GradientOps:
    """One backend's gradient ops."""

    backend: str
    grad_stats: Callable[[Sequence[Tensor]], GradientStatistics[Tensor]]
    scale_gradients: Callable[[Sequence[Tensor], Sequence[float]], None]


def taylor_score(w: Tensor, g: Tensor, side: Side = "both", backend: ImportanceBackend = "auto") -> ImportanceVectors:
    """Compute row and column sums of |w g| and w^2 g^2, and the statistics of g, reading each matrix once.

    Args:
        w: [O, I] floating point, the weight.
        g: [O, I] floating point, the gradient of w.
        side: which sums to compute: "rows", "columns" or "both". In the result, sums not computed are None.
        backend: which backend computes; "auto" uses the fastest that runs on w's device.

    Raises:
        BackendUnavailableError: the requested backend cannot run here.
        ValueError: the shapes differ, `side` is unknown, or the backend cannot read a tensor.
    """
    return select_ops(backend, w.device.type).taylor_score(w, g, side)


def linear_importance(
    x: Tensor, dy: Tensor, w: Tensor, side: Side = "both", backend: ImportanceBackend = "auto"
) -> ImportanceVectors:
    """Compute `taylor_score` of every sample's weight gradient dy_n^T x_n, summed over samples; no gradient is kept.

    Args:
        x: [N, T, I] floating point, the linear layer's input.
        dy: [N, T, O] floating point, the gradient of each sample's loss with respect to the layer's output.
        w: [O, I] floating point, the weight.
        side: which sums to compute: "rows", "columns" or "both". In the result, sums not computed are None.
        backend: which backend computes; "auto" uses the fastest that runs on w's device.

    Raises:
        BackendUnavailableError: the requested backend cannot run here.
        ValueError: the shapes do not fit, `side` is unknown, or the backend cannot read a tensor.
    """
    return select_ops(backend, w.device.type).linear_importance(x, dy, w, side)


def grouped_linear_importance(
    x: Tensor, dy: Tensor, w: Tensor, offsets: Tensor, side: Side = "both", backend: ImportanceBackend = "auto"
) -> GroupedVectors:
    """Compute `linear_importance` of each expert's weight on the tokens that the expert sees, a ragged batch.

    Args:
        x: [R, I] floating point, the inputs, one row for each pair of a token and an expert that sees it, ordered by
            expert and then by sample.
        dy: [R, O] floating point, the gradient of each sample's loss with respect to the outputs.
        w: [E, O, I] floating point, the weights.
        offsets: [E * N + 1] int64 on x's device, ascending: the rows of expert e and sample n begin at
            offsets[e * N + n] and end before the next offset. The gradient of a sample without rows is zero.
        side: which sums to compute: "rows", "columns" or "both". In the result, sums not computed are None.
        backend: which backend computes; "auto" uses the fastest that runs on w's device.

    Raises:
        BackendUnavailableError: the requested backend cannot run here.
        ValueError: the shapes do not fit, `side` is unknown, or the backend cannot read a tensor.
    """
    return select_ops(backend, w.device.type).grouped_linear_importance(x, dy, w, offsets, side)


def mask_gradient(x: Tensor, dx: Tensor, backend: ImportanceBackend = "auto") -> MaskGradient:
    """Compute each sample's gradient of a mask on a linear layer's input columns, and the input's sums of squares.

    Args:
        x: [N, T, I] floating point, the layer's input.
        dx: [N, T, I] floating point, the gradient of each sample's loss with respect to x.
        backend: which backend computes; "auto" uses the fastest that runs on x's device.

    Raises:
        BackendUnavailableError: the requested backend cannot run here.
        ValueError: the shapes differ, or the backend cannot read a tensor.
    """
    return select_ops(backend, x.device.type).mask_gradient(x, dx)


def cheapest_removals(
    inverse: Tensor, gram: Tensor, columns: int, count: int, backend: ImportanceBackend = "auto"
) -> Removals:
    """Remove groups of a weight's columns one by one, each time the group whose removal costs least squares least.

    Args:
        inverse: [k * c, k * c] fp64, the inverse of the inputs' Gram matrix, positive definite.
        gram: [k * c, k * c] fp64, W^T W of the weight W.
        columns: c, the number of columns of each group; group j consists of columns j * c to (j + 1) * c - 1.
        count: number of groups to remove, 0 to k.
        backend: which backend computes; "auto" uses the fastest that runs on the matrices' device.

    Ties are broken by the lower index.

    Raises:
        BackendUnavailableError: the requested backend cannot run here.
        ValueError: the arguments do not fit; the message names the argument.
    """
    return select_ops(backend, inverse.device.type).cheapest_removals(inverse, gram, columns, count)


def grad_stats(grads: Sequence[Tensor], backend: GradientBackend = "auto") -> GradientStatistics[Tensor]:
    """Compute the statistics of each gradient, reading every element once.

    Args:
        grads: K floating-point tensors of any shape on one device.
        backend: which backend computes; "auto" uses the fastest that runs on the gradients' device.

    Returns:
        Statistics with fields [K] fp64, on the gradients' device.

    Raises:
        BackendUnavailableError: the requested backend cannot run here.
        ValueError: the gradients are not on one device, or the backend cannot read one of them.
    """
    return select_gradient_ops(backend, _device(grads, backend)).grad_stats(grads)


def scale_gradients(grads: Sequence[Tensor], scales: Sequence[float], backend: GradientBackend = "auto") -> None:
    """Multiply grads[k] by scales[k] in place; a gradient whose scale is 1 is not touched.

    Args:
        grads: K floating-point tensors of any shape on one device that share no memory.
        scales: K numbers.
        backend: which backend computes; "auto" uses the fastest that runs on the gradients' device.

    Raises:
        BackendUnavailableError: the requested backend cannot run here.
        ValueError: the lengths differ, the gradients are not on one device, or the backend cannot scale one of them.
    """
    select_gradient_ops(backend, _device(grads, backend)).scale_gradients(grads, scales)


@cache
def select_ops(backend: ImportanceBackend, device: str, dtype: torch.dtype | None = None) -> ImportanceOps:
    """Return the importance ops of `backend` for tensors on a `device` of type "cpu", "cuda", ...

    dtype: the dtype of the weights; None if it is not known. There are no Triton kernels for fp64.

    Raises:
        BackendUnavailableError: the requested backend cannot run here; the message gives the reason.
    """
    chosen = _IMPORTANCE.select(backend, device)
    if dtype != torch.float64 or chosen.backend != "triton":
        return chosen
    if backend == "auto":
        return _IMPORTANCE.select("reference", device)
    raise BackendUnavailableError(
        f"backend: '{backend}' has no kernels for a float64 model; choose reference, or load the model in float32"
    )


@cache
def select_gradient_ops(backend: GradientBackend, device: str) -> GradientOps:
    """Return the gradient ops of `backend`; see `select_ops` for arguments and errors."""
    return _GRADIENT.select(backend, device)


def importance_ops_fault(backend: ImportanceBackend, device: str) -> str | None:
    """Return why `backend` cannot run the importance ops on `device`, or None if it can."""
    return _IMPORTANCE.fault(backend, device)


def gradient_ops_fault(backend: GradientBackend, device: str) -> str | None:
    """Return why `backend` cannot run the gradient ops on `device`, or None if it can."""
    return _GRADIENT.fault(backend, device)


def _device(grads: Sequence[Tensor], backend: GradientBackend) -> str:
    """Return the type of the gradients' device; if there are no gradients, a type that `backend` works on."""
    devices = {grad.device for grad in grads}
    if len(devices) > 1:
        raise ValueError(f"grads: are on {', '.join(sorted(map(str, devices)))}; all must be on one device")
    return devices.pop().type if devices else ("cuda" if backend == "cuda" else "cpu")


Ops = TypeVar("Ops")


@dataclass(frozen=True)
class _Family(Generic[Ops]):
    """A family of ops and its backends.

    name: name of the family in messages. preferred: the backend that "auto" uses on a GPU; elsewhere it uses "cpp".
    backends: by name of the backend, a function that returns why it cannot run on a type of device (None if it can),
        and a function that loads its ops.
    """

    name: str
    preferred: str
    backends: dict[str, tuple[Callable[[str], str | None], Callable[[], Ops]]]

    def fault(self, backend: str, device: str) -> str | None:
        if backend not in self.backends:
            return f"it has no {self.name} ops; choose auto, {', '.join(self.backends)}"
        fault, _ = self.backends[backend]
        return fault(device)

    def select(self, backend: str, device: str) -> Ops:
        """Return the backend's ops; only "auto" falls back to the reference, and logs why."""
        chosen = backend if backend != "auto" else self.preferred if device == "cuda" else "cpp"
        fault = self.fault(chosen, device)
        if fault is not None:
            if backend != "auto":
                raise BackendUnavailableError(f"backend: '{backend}' cannot run on {device}: {fault}")
            logger.info("backend 'auto' uses 'reference' on %s: '%s' cannot run: %s", device, chosen, fault)
            chosen = "reference"
        _, load = self.backends[chosen]
        return load()


def _importance_reference() -> ImportanceOps:
    return ImportanceOps(
        "reference",
        taylor_score_reference,
        linear_importance_reference,
        linear_importance_reference,
        grouped_linear_importance_reference,
        mask_gradient_reference,
        cheapest_removals_reference,
    )


def _importance_cpp() -> ImportanceOps:
    from gradprune.ops import cpp

    return ImportanceOps(
        "cpp",
        cpp.taylor_score_cpp,
        cpp.linear_importance_cpp,
        cpp.linear_importance_cpp,
        cpp.grouped_linear_importance_cpp,
        cpp.mask_gradient_cpp,
        cpp.cheapest_removals_cpp,
    )


def _importance_triton() -> ImportanceOps:
    from gradprune.ops import triton

    return ImportanceOps(
        "triton",
        triton.taylor_score_triton,
        triton.linear_importance_triton,
        partial(triton.linear_importance_triton, counted=False),
        triton.grouped_linear_importance_triton,
        triton.mask_gradient_triton,
        triton.cheapest_removals_triton,
    )


def _gradient_reference() -> GradientOps:
    return GradientOps("reference", grad_stats_reference, scale_gradients_reference)


def _gradient_cpp() -> GradientOps:
    from gradprune.ops.cpp import grad_stats_cpp, scale_gradients_cpp

    return GradientOps("cpp", grad_stats_cpp, scale_gradients_cpp)


def _gradient_cuda() -> GradientOps:
    from gradprune.ops.cuda import grad_stats_cuda, scale_gradients_cuda

    return GradientOps("cuda", grad_stats_cuda, scale_gradients_cuda)


_IMPORTANCE = _Family(
    "importance",
    "triton",
    {
        "reference": (reference_fault, _importance_reference),
        "cpp": (cpp_fault, _importance_cpp),
        "triton": (triton_fault, _importance_triton),
    },
)
_GRADIENT = _Family(
    "gradient",
    "cuda",
    {
        "reference": (reference_fault, _gradient_reference),
        "cpp": (cpp_fault, _gradient_cpp),
        "cuda": (cuda_fault, _gradient_cuda),
    },
)
