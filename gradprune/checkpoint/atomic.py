"""Reserve a folder's name for the duration of a run, so that no other run writes there and replacing it loses nothing.

A run that will write `results/x` takes the lock `results/.x.lock` before it loads anything, writes into
`results/.x.partial-*`, and at the end exchanges this folder with `results/x`. A killed run leaves the lock and the
partial folder behind; the next run of that name takes over the lock, removes the folder and logs a warning.
"""

import errno
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from safetensors import SafetensorError

from gradprune.checkpoint.lock import FileLock, LockHeldError
from gradprune.checkpoint.rename import exchange, rename_to_free
from gradprune.errors import CheckpointError, counted

logger = logging.getLogger(__name__)

# The claims of the enclosing `with` blocks, by absolute path, so that a job may claim a name that its command already
# holds. A new thread starts without claims.
_held: ContextVar[Mapping[Path, "Claim"] | None] = ContextVar("_held", default=None)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, which may be replaced by another checkpoint."""
    return (folder / "config.json").is_file()


def is_results(folder: Path) -> bool:
    """Whether a folder holds the results of a run, at one pruning ratio or at several."""
    return (folder / "run.json").is_file() or any(folder.glob("*/run.json"))


class Claim:
    """A folder's name that this run holds; created by `claimed`."""

    def __init__(
        self,
        directory: Path,
        overwrite: bool,
        argument: str,
        replaces: Callable[[Path], bool],
        reads: Mapping[str, str],
    ) -> None:
        """See `claimed`."""
        self.directory = directory
        self._overwrite = overwrite
        self._argument = argument
        self._replaces = replaces
        self._reads = reads
        self._aside = self._beside("old")

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Yield an empty hidden folder that is given the claimed name when the body ends, or deleted if the body fails.

        Raises:
            CheckpointError: something could not be written; or the name was taken during the run by something that may
                not be replaced. In this case the new content is kept beside it, and the message says where.
        """
        partial = self._beside(f"partial-{secrets.token_hex(8)}")
        try:
            with self._as_checkpoint_error():
                partial.mkdir()
                yield partial
                _follow_umask(partial)
                self._give_name(partial)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def check(self, free_bytes: int) -> None:
        """Check that the results can be written, as far as this is known in advance, or raise.

        Args:
            free_bytes: about how many bytes will be written.

        Raises:
            CheckpointError: see `claimed`.
        """
        self.check_name()
        with self._as_checkpoint_error():
            trial = self._beside(f"partial-{secrets.token_hex(8)}")
            try:
                trial.mkdir()
            finally:
                with suppress(FileNotFoundError):
                    trial.rmdir()
            free = shutil.disk_usage(self.directory.parent).free
        if free < free_bytes:
            raise CheckpointError(
                f"{self._argument}: '{self.directory}' needs about {free_bytes:,} bytes, but its file system has "
                f"{free:,} left; make room, or choose another output_dir"
            )

    def take_over(self) -> int:
        """Restore a folder that a killed run moved aside, and remove what it left; return how many were removed."""
        if self._aside.exists() and not self.directory.exists():
            self._aside.rename(self.directory)
        left = [path for path in self.directory.parent.iterdir() if path.name.startswith(f".{self.directory.name}.")]
        left = [path for path in left if path.is_dir() and (path == self._aside or self._is_partial(path))]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        return len(left)

    def _beside(self, what: str) -> Path:
        return self.directory.with_name(f".{self.directory.name}.{what}")

    def _is_partial(self, path: Path) -> bool:
        return path.name.startswith(f".{self.directory.name}.partial-")

    def check_name(self) -> None:
        """Check that the name is free or taken by something that may be replaced, or raise.

        Raises:
            CheckpointError: see `claimed`.
        """
        with self._as_checkpoint_error():
            self._check_name()

    def _check_name(self) -> None:
        directory, argument = self.directory, self._argument
        try:
            str(directory).encode()
        except UnicodeEncodeError:
            # The tokenizers library cannot write to such a path.
            raise CheckpointError(f"{argument}: {str(directory)!r} is not UTF-8; choose another name") from None
        if directory.is_symlink():
            raise CheckpointError(f"{argument}: '{directory}' is a symbolic link; name the folder it points to")
        if not directory.exists():
            return
        if not directory.is_dir():
            raise CheckpointError(f"{argument}: '{directory}' is a file; name a folder")
        if not self._overwrite:
            raise CheckpointError(
                f"{argument}: '{directory}' exists; choose another name or overwrite it (--overwrite)"
            )
        if any(directory.iterdir()) and not self._replaces(directory):
            raise CheckpointError(
                f"{argument}: '{directory}' was not written by a run of gradprune, and is never overwritten; "
                "choose another name"
            )
        self._check_not_read(directory.resolve())

    def _check_not_read(self, replaced: Path) -> None:
        """Refuse to replace a folder that holds a file the run reads, even through a link."""
        for option, read in ((option, Path(name)) for option, value in self._reads.items() for name in _names(value)):
            # A folder that cannot be listed cannot be read by the run either.
            with suppress(OSError):
                for path in [read, *(read.iterdir() if read.is_dir() else [])]:
                    if path.resolve().is_relative_to(replaced):
                        raise CheckpointError(
                            f"{self._argument}: '{self.directory}' holds the {option} '{read}' that this run reads, "
                            "and would be replaced; choose another name"
                        )

    def _give_name(self, partial: Path) -> None:
        try:
            rename_to_free(partial, self.directory)
            return
        except FileExistsError:
            pass
        try:
            self.check_name()
        except CheckpointError as error:
            kept = self._keep(partial)
            raise CheckpointError(f"{error} (it appeared during the run; the new results are in '{kept}')") from None
        exchange(partial, self.directory, self._aside)

    def _keep(self, partial: Path) -> Path:
        """Rename the finished content to the first free name of "NAME-2", "NAME-3", ..., and return its path."""
        number = 2
        while True:
            kept = self.directory.with_name(f"{self.directory.name}-{number}")
            try:
                rename_to_free(partial, kept)
                return kept
            except FileExistsError:
                number += 1

    @contextmanager
    def _as_checkpoint_error(self) -> Iterator[None]:
        """Context manager that turns OS and safetensors errors into one line that names the option and the path."""
        try:
            yield
        except OSError as error:
            # The error of a copy has two names; the second is the destination.
            path = error.filename2 or error.filename or self.directory
            raise CheckpointError(f"{self._argument}: '{path}' cannot be written: {error.strerror or error}") from error
        except SafetensorError as error:
            raise CheckpointError(
                f"{self._argument}: the weights in '{self.directory}' cannot be written: {error}"
            ) from error


@contextmanager
def claimed(
    directory: Path,
    *,
    overwrite: bool,
    argument: str,
    replaces: Callable[[Path], bool] = is_results,
    reads: Mapping[str, str] | None = None,
    free_bytes: int = 0,
    patience: float = 0.0,
) -> Iterator[Claim]:
    """Hold the name `directory` while the body runs; claiming it again inside the body yields the same claim.

    Args:
        directory: the folder to be written.
        overwrite: whether an existing folder may be replaced.
        argument: the option that the path came from, for messages.
        replaces: predicate of the existing folders that may be replaced; an empty folder always may.
        reads: what the run reads, by option; a folder that holds any of it is never replaced. A value is a file or a
            folder, or several separated by commas, each with or without a weight.
        free_bytes: about how many bytes will be written.
        patience: seconds to wait if another run is writing the folder.

    Raises:
        CheckpointError: the name is taken by something that may not be replaced, or by another run that is writing the
            folder; no folder can be created there; or the file system has too little space left.
    """
    held = _held.get() or {}
    path = directory.absolute()
    if path in held:
        yield held[path]
        return
    claim = Claim(directory, overwrite, argument, replaces, reads or {})
    claim.check_name()
    made = _make_folders(directory.parent, argument)
    try:
        lock = _lock(directory, argument, patience)
        try:
            _warn_if_taken_over(claim, lock)
            claim.check(free_bytes)
            token = _held.set({**held, path: claim})
            try:
                yield claim
            finally:
                _held.reset(token)
        finally:
            lock.release()
    finally:
        # A run that fails must leave no empty folders; those that have content are not removed by `rmdir`.
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def atomic_directory(
    directory: Path,
    *,
    overwrite: bool,
    argument: str,
    replaces: Callable[[Path], bool] = is_results,
    patience: float = 0.0,
) -> Iterator[Path]:
    """Yield a hidden folder beside `directory` that is given its name when the body ends, or deleted if the body fails.

    Args:
        directory, overwrite, argument, replaces, patience: see `claimed`. If an enclosing `claimed` holds the name
            already, that claim is used and its options apply.

    Raises:
        CheckpointError: see `claimed` and `Claim.writing`.
    """
    claim = claimed(directory, overwrite=overwrite, argument=argument, replaces=replaces, patience=patience)
    with claim as held, held.writing() as folder:
        yield folder


def _names(value: str) -> list[str]:
    """List every possible file name in a value such as "a.txt:0.7,b.jsonl:0.3", both with and without the weight."""
    parts = [part.strip() for part in value.split(",")]
    return [name for name in (*(part.rpartition(":")[0] for part in parts), *parts, value) if name]


def _make_folders(folder: Path, argument: str) -> list[Path]:
    """Create `folder` and its missing parents; return the folders created, the deepest first."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            made.insert(0, path)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    except OSError as error:
        for path in made:
            path.rmdir()
        raise CheckpointError(
            f"{argument}: the folder '{error.filename}' cannot be made: {error.strerror}; choose another output_dir"
        ) from error
    return made


def _lock(directory: Path, argument: str, patience: float) -> FileLock:
    path = directory.with_name(f".{directory.name}.lock")
    deadline = time.monotonic() + patience
    try:
        while True:
            try:
                return FileLock(path)
            except LockHeldError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(0.05)
    except LockHeldError as error:
        who = "another run" if error.owner is None else f"another run ({error.owner})"
        raise CheckpointError(
            f"{argument}: '{directory}' is being written by {who}; wait for it, or choose another name"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{argument}: '{directory}' cannot be written: {error.strerror}; choose another name or output_dir"
        ) from error


def _warn_if_taken_over(claim: Claim, lock: FileLock) -> None:
    left = claim.take_over()
    if lock.abandoned is not None or left:
        who = "a run" if lock.abandoned is None else f"a run ({lock.abandoned})"
        removed = "it left nothing to remove"
        if left:
            removed = f"its unfinished files have been removed ({counted(left, 'folder')})"
        logger.warning("%s of '%s' was killed; %s", who, claim.directory, removed)


def _follow_umask(folder: Path) -> None:
    """Give files the permissions that the umask allows, because safetensors makes them readable only by the owner."""
    # The folder was created with default permissions, so its mode shows the umask. The system offers no call that only
    # reads the umask.
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
