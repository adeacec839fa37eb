"""A lock file that one process holds and that a crash leaves recognisable.

The file is locked by the file system (`flock`). Where it has no locks, the file itself is the lock: one `link`, which
fails where the name is taken, makes it appear with its owner in it.
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
    """Who holds a lock: process `pid` on machine `host`, since `started` (local time)."""

    pid: int
    host: str
    started: str

    def __str__(self) -> str:
        """For messages."""
        return f"process {self.pid} on {self.host}, since {self.started}"


class LockHeldError(Exception):
    """The lock is held; `owner` is None while its holder has not written who it is."""

    def __init__(self, owner: Owner | None) -> None:
        """owner: who holds it."""
        super().__init__(str(owner))
        self.owner = owner


class FileLock:
    """An exclusive lock on `path`, which is deleted on release.

    abandoned: the owner whose lock was taken over, because it ended without releasing it; None if there was none.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock at once.

        Raises:
            LockHeldError: another process, or another lock of this one, holds it.
            OSError: the file cannot be made.
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
        """Delete the file, and let go."""
        # In this order: whoever waits for it finds another file, or none, under its name and tries again.
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
    """The descriptor of the locked file that has this name now."""
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
    """Make the file with `record` in it; returns the owner that it was taken over from, if there was one.

    Raises:
        LockHeldError: it is there, and its owner lives or is on another machine, which cannot be asked.
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
    """Remove the file of an owner that has ended; returns that owner, None where the file has gone by itself."""
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
    # Between reading and renaming, another run may have taken the lock: then it gets its file back.
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
