"""Shared fixtures; tests that need a GPU are skipped with a reason if this machine has none."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging

# Without a GPU Triton's kernels run in its interpreter, which is chosen when triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The models here are tiny: a second thread costs more than it gains, and if other tests occupy the cores, it waits for
# them by spinning. This holds in this process and in those that tests start. Tests of threading set their own number.
torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

# On Intel CPUs MKL divides long sums among threads, unless this variable is set before its first matrix product.
if sys.platform == "linux" and "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="ignore"):
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# A shell starts background jobs with Ctrl-C (SIGINT) ignored, and programs pass that on to the programs they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# There is no deadline, because an example's time mainly depends on how busy the machine is.
settings.register_profile("gradprune", deadline=None)
settings.load_profile("gradprune")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        # Not `item.keywords`, because these include the names of folders.
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="this machine has no CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn, because what holds on the CPU must hold on a GPU."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test from using the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _same_verbosity() -> Iterator[None]:
    """Restore the verbosity of transformers after each test, because commands lower it."""
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Restore the number of threads after a test that sets it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def stories_model() -> Path:
    """The folder of a real 260K-parameter Llama, which is beside the repository where gradprune is developed."""
    path = SHARED / "models" / "stories260k"
    if not path.is_dir():
        pytest.skip(f"the stories260k model is not at {path}")
    return path


@pytest.fixture(scope="session")
def stories_text() -> tuple[Path, Path]:
    """The files of calibration and evaluation text that resembles the training text of `stories_model`."""
    folder = SHARED / "text"
    if not folder.is_dir():
        pytest.skip(f"the stories texts are not at {folder}")
    return folder / "stories_calibration.txt", folder / "stories_eval.txt"


@pytest.fixture(scope="session")
def shared_tasks() -> Path:
    """The folder of multiple-choice questions, one JSONL file per task."""
    folder = SHARED / "tasks"
    if not folder.is_dir():
        pytest.skip(f"the questions are not at {folder}")
    return folder
