"""Write a file so that it appears completely or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path, partial: str) -> Iterator[Path]:
    """Yield an empty hidden file beside `path` that is given its name when the body ends, or deleted if the body fails.

    Args:
        path: path of the file to be written; an existing file is replaced. The permissions follow the umask.
        partial: name of the hidden file. A killed process leaves the hidden file behind, and the next process that
            uses the same name overwrites it; processes that write at the same time need different names.

    Raises:
        OSError: the file cannot be written; the error names `path`, and an existing file is unchanged.
    """
    new = path.with_name(partial)
    try:
        with new.open("wb") as file:
            # The library that writes the content may set permissions of its own, as safetensors does.
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
        # `lexists` rather than `unlink(missing_ok=True)`: if the file could not be created, `unlink` may raise as well.
        if os.path.lexists(new):
            new.unlink()
