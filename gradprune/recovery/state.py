"""The state from which an interrupted recovery resumes: sealed safetensors files, nothing pickled."""

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

# Each has a file of its own, with the progress in it.
_PARTS = ("weights", "best", "moments")


@dataclass
class Progress:
    """Progress of a recovery.

    run: digest of its options and of the model it started from. total: steps planned; step: steps done.
    best: smallest held-out loss so far, in nats per token, of `best_step`. history: (step, loss) of every check.
    """

    run: str
    total: int
    step: int = 0
    best: float = math.inf
    best_step: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)


def digest(options: dict[str, Any], model: PreTrainedModel, teacher: PreTrainedModel | None, tokens: Tensor) -> str:
    """Names a run: equal for equal options, start, teacher and text."""
    found = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for each in (model, *([] if teacher is None else [teacher])):
        found.update(model_digest(each).encode())
    found.update(tensors_digest([tokens]).encode())
    return found.hexdigest()


def save_state(folder: Path, progress: Progress, weights: Tensors, best: Tensors, moments: Tensors) -> None:
    """Replace the state atomically: a kill leaves either the previous state or this one.

    Args:
        folder: of the state. progress: how far. weights, best: of the trained parameters. moments: the optimizer's.
    """
    with atomic_directory(folder, overwrite=True, argument="output_name", replaces=_is_state) as partial:
        for name, tensors in zip(_PARTS, (weights, best, moments), strict=True):
            # Copied, because parameters may share memory, which the format does not take.
            copies = {key: value.detach().cpu().clone() for key, value in tensors.items()}
            write_sealed(_file(partial, name), copies, asdict(progress))


def _is_state(folder: Path) -> bool:
    return _file(folder, _PARTS[0]).is_file()


def _file(folder: Path, part: str) -> Path:
    return folder / f"{part}.safetensors"


def load_state(folder: Path, run: str) -> tuple[Progress, Tensors, Tensors, Tensors] | None:
    """What `save_state` saved of this run; None if there is none.

    Raises:
        RecoveryError: what is there is another run's, or damaged.
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
            f"output_name: '{folder}' holds an interrupted recovery with other options, models or text; give those to "
            "go on with it, or delete the folder"
        )
    stated["history"] = [(step, loss) for step, loss in stated["history"]]
    weights, best, moments = (tensors for tensors, _ in parts)
    return Progress(**stated), weights, best, moments
