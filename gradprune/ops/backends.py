"""Which backends can run here and why others cannot, and the choice between them, for every kind of op."""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import TypeVar

from gradprune.errors import BackendUnavailableError

logger = logging.getLogger(__name__)

# The names of the backends of one kind of ops.
_Backend = TypeVar("_Backend", bound=str)


def choose_backend(
    backend: _Backend, device: str, preferred: _Backend, reason: Callable[[_Backend, str], str | None]
) -> str:
    """`backend`, or what "auto" stands for on `device`: `preferred` if it can run, else the reference.

    Only "auto" falls back, and logs why; a backend asked for by name is used or refused.

    Args:
        reason: why a backend cannot run on a device, or None if it can.

    Raises:
        BackendUnavailableError: with the reason.
    """
    chosen = preferred if backend == "auto" else backend
    fault = reason(chosen, device)
    if fault is None:
        return chosen
    if backend != "auto":
        raise BackendUnavailableError(f"backend: '{backend}' cannot run on {device}: {fault}")
    logger.info("backend 'auto' uses 'reference' on %s: '%s' cannot run: %s", device, preferred, fault)
    return "reference"


def cpp_fault(device: str) -> str | None:
    """Why the C++ kernels cannot run on `device`, or None if they can."""
    if device != "cpu":
        return "the C++ kernels work on CPU tensors"
    return _extension_fault()


def triton_fault(device: str) -> str | None:
    """Why the Triton kernels cannot run on `device`, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'gradprune[triton]')"
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "it needs a CUDA device (or TRITON_INTERPRET=1, to check kernels on the CPU)"


def cuda_fault(device: str) -> str | None:
    """Why the CUDA kernels cannot run on `device` (on a GPU: on the current one), or None if they can."""
    if device != "cuda":
        return "the CUDA kernels work on CUDA tensors"
    fault = _extension_fault()
    if fault is not None:
        return fault
    from gradprune import _C

    if not _C.build_info()["cuda"]:
        return "gradprune was built without a CUDA compiler (reinstall it where nvcc is on the PATH)"
    return _C.cuda_fault()


def no_kernel(ops: str, backend: str, backends: tuple[str, ...]) -> str:
    """Why `backend` cannot run a kind of ops for which there are only `backends`."""
    name = {"triton": "Triton", "cuda": "CUDA C++"}.get(backend, f"'{backend}'")
    return f"no {ops} op has a {name} kernel; choose one of {', '.join(backends)}"


def _extension_fault() -> str | None:
    try:
        importlib.import_module("gradprune._C")
    except ImportError as error:
        return f"the extension gradprune._C does not import: {error} (reinstall gradprune with a C++ compiler)"
    return None
