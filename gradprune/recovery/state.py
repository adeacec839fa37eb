"""The state from which an interrupted recovery resumes: safetensors and JSON, nothing pickled."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradprune.checkpoint.atomic import atomic_directory
from gradprune.errors import RecoveryError

Tensors = dict[str, Tensor]


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


def digest(options: dict[str, Any], model: nn.Module, teacher: nn.Module | None, tokens: Tensor) -> str:
    """Names a run: equal for equal options, start, teacher and text."""
    found = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for module in (model, *([] if teacher is None else [teacher])):
        for name, tensor in sorted(module.named_parameters()):
            found.update(f"{name}{list(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    found.update(tokens.numpy().tobytes())
    return found.hexdigest()


def save_state(folder: Path, progress: Progress, weights: Tensors, best: Tensors, moments: Tensors) -> None:
    """Replace the state atomically: a kill leaves either the previous state or this one.

    Args:
        folder: of the state. progress: how far. weights, best: of the trained parameters. moments: the optimizer's.
    """
    with atomic_directory(folder, overwrite=True, argument="output_name", replaces=_is_state) as partial:
        for name, tensors in (("weights", weights), ("best", best), ("moments", moments)):
            # Copied, because parameters may share memory, which the format does not take.
            copies = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
            save_file(copies, partial / f"{name}.safetensors")
        (partial / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")


def _is_state(folder: Path) -> bool:
    return (folder / "progress.json").is_file()


def load_state(folder: Path, run: str) -> tuple[Progress, Tensors, Tensors, Tensors] | None:
    """What `save_state` saved of this run; None if there is none.

    Raises:
        RecoveryError: what is there is another run's.
    """
    if not folder.is_dir():
        return None
    stated = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    if stated["run"] != run:
        raise RecoveryError(
            f"output_name: '{folder}' holds an interrupted recovery with other options, models or text; give those to "
            "go on with it, or delete the folder"
        )
    stated["history"] = [(step, loss) for step, loss in stated["history"]]
    weights, best, moments = (load_file(folder / f"{name}.safetensors") for name in ("weights", "best", "moments"))
    return Progress(**stated), weights, best, moments
