"""The state from which an interrupted recovery resumes, in sealed safetensors files without any pickle."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from gradprune.calibration.sealed import DamagedFileError, read_sealed, write_sealed
from gradprune.checkpoint.atomic import atomic_directory
from gradprune.errors import RecoveryError
from gradprune.models.digest import model_digest, tensors_digest

Tensors = dict[str, Tensor]

# Each part of the state is a file of its own, which also records the progress.
_PARTS = ("weights", "best", "moments")


@dataclass
class Progress:
    """The progress of a recovery.

    run: the run's digest, see `digest`. total: number of steps planned. step: number of steps done.
    best: smallest held-out loss so far, in nats per token, which was measured after `best_step` steps.
    history: (step, held-out loss) of every check.
    """

    run: str
    total: int
    step: int = 0
    best: float = math.inf
    best_step: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)


def digest(options: dict[str, Any], model: PreTrainedModel, teacher: PreTrainedModel | None, tokens: Tensor) -> str:
    """Identify a run by a digest of its options, initial model, teacher and text."""
    found = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for each in (model, *([] if teacher is None else [teacher])):
        found.update(model_digest(each).encode())
    found.update(tensors_digest([tokens]).encode())
    return found.hexdigest()


def save_state(folder: Path, progress: Progress, weights: Tensors, best: Tensors, moments: Tensors) -> None:
    """Replace the state atomically: if the process is killed, either the previous state or this one remains.

    Args:
        folder: the folder of the state.
        progress: the progress so far.
        weights, best: the current and the best values of the trained parameters, by name.
        moments: the optimizer's state, by parameter and key.
    """
    with atomic_directory(folder, overwrite=True, argument="output_name", replaces=_is_state) as partial:
        for name, tensors in zip(_PARTS, (weights, best, moments), strict=True):
            # Copies, because parameters may share memory, which safetensors does not allow.
            copies = {key: value.detach().cpu().clone() for key, value in tensors.items()}
            write_sealed(_file(partial, name), copies, asdict(progress))


def _is_state(folder: Path) -> bool:
    return _file(folder, _PARTS[0]).is_file()


def _file(folder: Path, part: str) -> Path:
    return folder / f"{part}.safetensors"


def load_state(folder: Path, run: str) -> tuple[Progress, Tensors, Tensors, Tensors] | None:
    """Load the progress, weights, best weights and moments that `save_state` saved for this run; None without a state.

    Args:
        folder: the folder of the state.
        run: the run's digest.

    Raises:
        RecoveryError: the state is another run's or damaged.
    """
    if not folder.is_dir():
        return None
    try:
        parts = [read_sealed(_file(folder, name)) for name in _PARTS]
    except DamagedFileError as error:
        raise RecoveryError(
            f"output_name: '{folder}' holds an interrupted recovery that is damaged ({error}); delete the folder to "
            "start again"
        ) from error
    stated = parts[0][1]
    if stated["run"] != run:
        raise RecoveryError(
            f"output_name: '{folder}' holds an interrupted recovery with other options, models or text; give the "
            "same ones to resume it, or delete the folder"
        )
    stated["history"] = [(step, loss) for step, loss in stated["history"]]
    weights, best, moments = (tensors for tensors, _ in parts)
    return Progress(**stated), weights, best, moments
