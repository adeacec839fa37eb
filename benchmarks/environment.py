"""The environment that a benchmark ran in: hardware, driver, versions and revision of the code."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# The measured code; without git, a hash over these files replaces the revision.
_SOURCES = ("gradprune/**/*.py", "kernels/**/*.py", "csrc/**/*.cpp", "csrc/**/*.h", "csrc/**/*.cu", "csrc/**/*.cuh")


@dataclass(frozen=True)
class Environment:
    """The environment that a benchmark ran in.

    hardware: name of the CPU or GPU. driver: version of the GPU driver, None on a CPU. threads: PyTorch's CPU threads.
    revision: see `revision`.
    """

    device: str
    hardware: str
    driver: str | None
    threads: int
    python: str
    torch: str
    triton: str | None
    transformers: str | None
    gradprune: str
    revision: str


@cache
def environment(device: str) -> Environment:
    """Return the environment of benchmarks on `device`, "cpu" or "cuda"."""
    import gradprune

    return Environment(
        device=device,
        hardware=torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        driver=_driver() if device == "cuda" else None,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        transformers=_version("transformers"),
        gradprune=gradprune.__version__,
        revision=revision(),
    )


def cpu_name() -> str:
    """The CPU's model, its number of cores, and the widest vector instruction set it has."""
    model, flags = platform.processor() or platform.machine(), ""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        fields = dict(
            (part.strip() for part in line.split(":", 1))
            for line in information.read_text().splitlines()
            if ":" in line
        )
        model, flags = fields.get("model name", model), fields.get("flags", "")
    isa = next((name for name in ("avx512f", "avx2") if name in flags.split()), "")
    return " ".join(f"{model}, {os.cpu_count()} cores {isa}".split())


def last_level_cache_bytes() -> int:
    """Size of the CPU's last-level cache; 32 MiB if the system does not report it."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=32 << 20)


@cache
def revision() -> str:
    """`$GRADPRUNE_REVISION`, or git's commit ("-dirty" if tracked files differ from it), or a hash of the sources."""
    if named := os.environ.get("GRADPRUNE_REVISION"):
        return named
    try:
        commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
        # Left out: results and plots, because benchmarks themselves write them, and Markdown, which is not measured.
        changed = _output(
            "git",
            "-C",
            str(ROOT),
            "status",
            "--porcelain",
            "-uno",
            "--",
            ".",
            ":!benchmarks/results",
            ":!benchmarks/plots",
            ":!*.md",
        )
    except (OSError, subprocess.SubprocessError):
        return f"sources-{sources_hash()}"
    return f"{commit}-dirty" if changed else commit


def sources_hash() -> str:
    """12 hexadecimal digits of a hash over the paths and contents of the measured sources."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in ROOT.glob(pattern)):
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def _driver() -> str | None:
    try:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
