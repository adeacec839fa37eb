"""Sealed files: tensors and a JSON record in one safetensors file with a digest, which is replaced atomically."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gradprune.checkpoint.atomic_file import atomic_file
from gradprune.errors import one_line
from gradprune.models.digest import tensors_digest


class DamagedFileError(Exception):
    """A file is not what `write_sealed` wrote; the message says why."""


def write_sealed(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Create or replace a sealed file atomically; the same content gives the same bytes.

    Args:
        path: the path of the file.
        tensors: the tensors by name, on the CPU.
        record: the JSON-serialisable record.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    text = json.dumps(record, sort_keys=True)
    try:
        with atomic_file(path, f".{path.name}.new") as new:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                new,
                # A single entry, because safetensors does not fix the order of several.
                {"gradprune": json.dumps({"digest": _digest(tensors, text), "record": text})},
            )
    except SafetensorError as error:
        raise OSError(0, one_line(error), str(path)) from error


def read_sealed(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the record of a sealed file.

    Raises:
        DamagedFileError: the file is missing, or is not a complete file that `write_sealed` wrote.
    """
    try:
        with safe_open(path, framework="pt") as file:
            sealed = json.loads((file.metadata() or {})["gradprune"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if sealed["digest"] != _digest(tensors, sealed["record"]):
            raise DamagedFileError("its content is not what was written")
        return tensors, dict(json.loads(sealed["record"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(one_line(error)) from error


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    names = sorted(tensors)
    content = tensors_digest(tensors[name] for name in names)
    return hashlib.sha256(json.dumps([names, content, text]).encode()).hexdigest()
