"""Checks of which backends can run here, each with the reason if one cannot."""

import importlib
import importlib.util
import os


def reference_fault(_device: str) -> None:
    """Return None, because plain PyTorch runs on every device."""


def cpp_fault(device: str) -> str | None:
    """Return why the C++ kernels cannot run on `device`, or None if they can."""
    if device != "cpu":
        return "the C++ kernels work on CPU tensors"
    return _extension_fault()


def triton_fault(device: str) -> str | None:
    """Return why the Triton kernels cannot run on `device`, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'gradprune[triton]')"
    if importlib.util.find_spec("gradprune.kernels") is None:
        return "the package gradprune.kernels is missing (install gradprune, which provides it)"
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "it needs a CUDA device (or TRITON_INTERPRET=1, which runs kernels on the CPU for tests)"


def cuda_fault(device: str) -> str | None:
    """Return why the CUDA kernels cannot run on `device` ("cuda" means the current GPU), or None if they can."""
    if device != "cuda":
        return "the CUDA kernels work on CUDA tensors"
    fault = _extension_fault()
    if fault is not None:
        return fault
    from gradprune import _C

    if not _C.build_info()["cuda"]:
        return "gradprune was built without a CUDA compiler (reinstall it with nvcc on the PATH)"
    return _C.cuda_fault()


def _extension_fault() -> str | None:
    try:
        importlib.import_module("gradprune._C")
    except ImportError as error:
        return f"the extension gradprune._C does not import: {error} (reinstall gradprune with a C++ compiler)"
    return None
