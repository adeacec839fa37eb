"""Checks, before transformers reads a checkpoint, that its files are safetensors with floating-point weights."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from gradprune.errors import CheckpointError, UnsupportedArchitectureError, one_line

_FLOATING = ("F64", "F32", "F16", "BF16")


def check_index(base_model: str | Path, *, argument: str, local_files_only: bool) -> None:
    """Refuse a weights index that names anything other than safetensors files in its own folder.

    transformers opens whatever an index names, even a pickle or a file outside the folder.

    Raises:
        CheckpointError: the index cannot be read, or names another file or one that is missing; the message says which.
    """
    folder = Path(base_model)
    if folder.is_dir():
        missing = [path.name for path in weight_files(folder, argument) if not path.is_file()]
        if missing and (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            raise CheckpointError(
                f"{argument}: '{base_model}' lacks '{missing[0]}', which its {SAFE_WEIGHTS_INDEX_NAME} names"
            )
        return
    found = cached_file(
        str(base_model),
        SAFE_WEIGHTS_INDEX_NAME,
        local_files_only=local_files_only,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is not None:
        _shards(Path(found), argument)


def check_floating(folder: Path, *, argument: str) -> None:
    """Refuse weights stored as integers or in 8 bits, because casting them to a float does not restore the weights.

    Raises:
        UnsupportedArchitectureError: there are such weights; the message names the first.
        CheckpointError: a file is missing or damaged.
    """
    for path in weight_files(folder, argument):
        try:
            with safe_open(path, framework="pt") as file:
                types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{argument}: '{path}' is not a whole safetensors file: {one_line(error)}") from error
        for name, stored in types.items():
            if name.endswith((".weight", ".bias")) and stored not in _FLOATING:
                raise UnsupportedArchitectureError(
                    f"{argument}: {name} of '{folder}' is stored as {stored}; name the unquantised checkpoint "
                    f"(weights are one of {', '.join(_FLOATING)})"
                )


def weight_files(folder: Path, argument: str) -> list[Path]:
    """The weight files that transformers reads: the single file if it exists or there is no index, else the shards."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file() or not index.is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    return [folder / name for name in _shards(index, argument)]


def _shards(index: Path, argument: str) -> list[str]:
    """The distinct file names in an index, after checking that each is a safetensors file in the same folder."""
    try:
        names = list(dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{argument}: '{index}' is not an index of weights: {one_line(error)}") from error
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(f"{argument}: '{index}' names {name!r}; only *.safetensors files beside it are read")
    return names
