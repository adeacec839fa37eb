"""A lock file that one process holds and that can be recognised as abandoned if the process crashes.

The file is locked by the file system (`flock`). On a file system without locks, the existence of the file is the lock:
a single `link`, which fails if the name is taken, creates it with its owner's record already in it.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

# The errors of a file system without locks, e.g. Lustre mounted without `flock`.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


@dataclass(frozen=True)
class Owner:
    """The holder of a lock: process `pid` on machine `host`, since `started` (local time)."""

    pid: int
    host: str
    started: str

    def __str__(self) -> str:
        """Describe the owner for messages."""
        return f"process {self.pid} on {self.host}, since {self.started}"


class LockHeldError(Exception):
    """The lock is held; `owner` is None if its holder is unknown, for example because its record is not written yet."""

    def __init__(self, owner: Owner | None) -> None:
        """owner: the holder, or None if it is unknown."""
        super().__init__(str(owner))
        self.owner = owner


class FileLock:
    """An exclusive lock on `path`, which is deleted on release.

    abandoned: the previous owner if it ended without releasing the lock, which was then taken over; else None.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock without waiting.

        Raises:
            LockHeldError: another process, or another `FileLock` of this process, holds the lock.
            OSError: the file cannot be created or written.
        """
        self._path = path
        me = Owner(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))
        record = json.dumps(asdict(me)).encode()
        if not _has_locks(path.parent):
            self._descriptor = None
            self.abandoned = _link(path, record)
            return
        self._descriptor = _locked(path)
        self.abandoned = _read_owner(path)
        try:
            os.truncate(self._descriptor, 0)
            os.pwrite(self._descriptor, record, 0)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Delete the file, then unlock it."""
        # In this order, because a process that locks the file afterwards sees that the name no longer refers to it and
        # tries again.
        with suppress(OSError):
            self._path.unlink()
        if self._descriptor is not None:
            os.close(self._descriptor)


def _has_locks(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _NO_LOCKS
    finally:
        os.close(descriptor)
    return True


def _locked(path: Path) -> int:
    """Open or create the file, lock it, and return its descriptor if `path` still refers to it; else try again."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # released between open and lock
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise LockHeldError(_read_owner(path)) from None
            raise
        os.close(descriptor)


def _link(path: Path, record: bytes) -> Owner | None:
    """Create the lock file with `record` in it; return the owner whose abandoned file it replaces, None without one.

    Raises:
        LockHeldError: the file exists, and its owner is alive or on another machine, where that cannot be checked.
    """
    mine = _beside(path)
    mine.write_bytes(record)
    abandoned = None
    try:
        while True:
            try:
                os.link(mine, path)
                return abandoned
            except FileExistsError:
                abandoned = _remove_abandoned(path)
    finally:
        mine.unlink()


def _remove_abandoned(path: Path) -> Owner | None:
    """Remove the lock file of an owner that has ended and return that owner, or None if the file no longer exists.

    Raises:
        LockHeldError: see `_link`.
    """
    try:
        owner = _owner(path.read_bytes())
    except FileNotFoundError:
        return None  # released meanwhile
    if owner is not None and (owner.host != socket.gethostname() or _alive(owner.pid)):
        raise LockHeldError(owner)
    taken = _beside(path)
    try:
        path.rename(taken)
    except FileNotFoundError:
        return None
    # Another run may have taken the lock between the reading and the renaming; its file is then put back.
    if _read_owner(taken) != owner:
        with suppress(FileExistsError):
            os.link(taken, path)
    taken.unlink()
    return owner


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}-{secrets.token_hex(8)}")


def _read_owner(path: Path) -> Owner | None:
    try:
        return _owner(path.read_bytes())
    except OSError:
        return None


def _owner(record: bytes) -> Owner | None:
    try:
        return Owner(**json.loads(record))
    except (ValueError, TypeError):
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
