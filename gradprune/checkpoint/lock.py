"""A lock file that one process holds and that a crash leaves recognisable."""

import errno
import fcntl
import json
import os
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
        self._descriptor = _locked(path)
        self.abandoned = _read_owner(path)
        me = Owner(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))
        try:
            os.truncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(asdict(me)).encode(), 0)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Delete the file, and let go."""
        # In this order: whoever waits for it finds another file, or none, under its name and tries again.
        with suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)


def _locked(path: Path) -> int:
    """The descriptor of the locked file that has this name now."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, path)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # released between open and lock
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise LockHeldError(_read_owner(path)) from None
        if error.errno not in _NO_LOCKS:
            raise
        # Without locks the owner's process decides. One on another machine cannot be asked.
        owner = _read_owner(path)
        if owner is not None and (owner.host != socket.gethostname() or _alive(owner.pid)):
            raise LockHeldError(owner) from None


def _read_owner(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
