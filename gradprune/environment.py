"""The content of `gradprune info`: versions, devices, which backends work here, and why the others do not."""

import importlib.metadata
import platform
from typing import Any, get_args

import torch

from gradprune.config import GradientBackend, ImportanceBackend
from gradprune.errors import counted
from gradprune.ops.dispatch import gradient_ops_fault, importance_ops_fault
from gradprune.version import __version__


def environment() -> dict[str, Any]:
    """Return versions, devices and, by device type and backend, None if the backend works, else the reason why not.

    `backends` are those of the importance ops, the choices of `--backend`; `gradient_backends` those of the gradient
    ops.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "versions": {"gradprune": __version__, "python": platform.python_version(), **_versions()},
        "devices": {
            "cpu": f"{platform.machine()}, {counted(torch.get_num_threads(), 'thread')}",
            **{f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())},
        },
        "backends": {
            device: {backend: importance_ops_fault(backend, device) for backend in _named(ImportanceBackend)}
            for device in devices
        },
        "gradient_backends": {
            device: {backend: gradient_ops_fault(backend, device) for backend in _named(GradientBackend)}
            for device in devices
        },
    }


def _named(backends: Any) -> list[Any]:
    """Return the members of a `Literal` of backends, without "auto"."""
    return [backend for backend in get_args(backends) if backend != "auto"]


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in ("torch", "transformers", "triton", "safetensors", "numpy", "datasets"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions
