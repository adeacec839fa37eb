"""Checks on a checkpoint's files before transformers reads them: only safetensors of floating-point weights."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from gradprune.errors import CheckpointError, UnsupportedArchitectureError, one_line

_FLOATING = ("F64", "F32", "F16", "BF16")


def check_index(base_model: str | Path, *, argument: str, local_files_only: bool) -> None:
    """Refuse an index of weights that names anything but safetensors files beside it.

    transformers opens whatever an index names: a pickle, or a file outside the folder.

    Raises:
        CheckpointError: naming the entry.
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
    """Refuse weights stored as whole numbers or in 8 bits: cast to a float, they are not what was trained.

    Raises:
        UnsupportedArchitectureError: naming the first.
        CheckpointError: a file is damaged.
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
    """The files that transformers reads: one, unless there are only an index and its shards."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file() or not index.is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    return [folder / name for name in _shards(index, argument)]


def _shards(index: Path, argument: str) -> list[str]:
    """The file names in an index, each once; each a safetensors file beside it."""
    try:
        names = list(dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{argument}: '{index}' is not an index of weights: {one_line(error)}") from error
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(f"{argument}: '{index}' names {name!r}; only *.safetensors files beside it are read")
    return names
