"""Renames that never lose what already has the name: exchange two folders, or take a name only while it is free.

Linux does both atomically (`renameat2`, Linux 3.15) on most file systems. Elsewhere the exchange is two renames that
are undone if anything, an interrupt too, comes between them.
"""

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
# The errors of a kernel or file system without these flags.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def rename_to_free(source: Path, target: Path) -> None:
    """Give `source` the name `target`.

    Raises:
        FileExistsError: something has that name, be it an empty folder or a dangling link; it is left alone.
        OSError: the rename failed.
    """
    if _renameat2(source, target, _NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        raise


def exchange(new: Path, old: Path, aside: Path) -> None:
    """Swap the contents of the two names.

    Args:
        new, old: two existing folders of one file system.
        aside: a free name beside them for `old`, used only where the file system cannot exchange. A process killed
            in between leaves `old`'s content there.

    Raises:
        OSError: the exchange failed, and both are as they were.
    """
    if _renameat2(new, old, _EXCHANGE):
        return
    try:
        old.rename(aside)
        new.rename(old)
    except BaseException:
        if aside.exists() and not old.exists():
            aside.rename(old)
        raise
    aside.rename(new)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Whether the system could do it; False where it knows no such rename."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flag)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
