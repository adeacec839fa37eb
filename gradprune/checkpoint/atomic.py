"""Folders that appear whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradprune.errors import CheckpointError


def check_free(directory: Path, *, overwrite: bool, argument: str) -> None:
    """Raise if `directory` exists and may not be replaced, or is no folder.

    Raises:
        CheckpointError: naming `argument`, the option the path came from.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{argument}: '{directory}' is a file; name a folder")
    if directory.exists() and not overwrite:
        raise CheckpointError(f"{argument}: '{directory}' exists; choose another name or overwrite it (--overwrite)")


@contextmanager
def atomic_directory(directory: Path, *, overwrite: bool, argument: str) -> Iterator[Path]:
    """Yield a hidden folder beside `directory` that takes its name when the body ends; deleted if it fails.

    Raises:
        CheckpointError: `directory` exists and `overwrite` is False.
    """
    check_free(directory, overwrite=overwrite, argument=argument)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if directory.exists():
            # A rename cannot replace a filled folder; the old one is set aside until the new one is in place.
            old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old-", dir=directory.parent))
            directory.rename(old / directory.name)
            try:
                partial.rename(directory)
            except BaseException:
                (old / directory.name).rename(directory)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
