"""One file that appears whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path, partial: str) -> Iterator[Path]:
    """Yield an empty hidden file beside `path` that takes its name when the body ends; deleted if the body fails.

    Args:
        path: of the file to be written; an existing one is replaced. Its permissions follow the umask.
        partial: the hidden file's name. A killed process leaves it behind: the next one that gives the same name writes
            over it, while several that write at once need different names.

    Raises:
        OSError: it cannot be written, which names `path`; an existing file is unchanged.
    """
    new = path.with_name(partial)
    try:
        with new.open("wb") as file:
            # What writes the body may set permissions of its own, as safetensors does.
            mode = os.fstat(file.fileno()).st_mode & 0o777
        yield new
        new.chmod(mode)
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        if error.filename == str(new):
            error.filename = str(path)
        raise
    finally:
        # Where it could not be made, it cannot always be looked for either.
        if os.path.lexists(new):
            new.unlink()
