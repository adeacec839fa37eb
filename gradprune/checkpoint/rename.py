"""Renames that never destroy an existing file or folder: exchange two folders, or take a name only if it is free.

Linux does both atomically (`renameat2`, since Linux 3.15) on most file systems. Elsewhere the exchange consists of
several renames, and the first is undone if the second fails or is interrupted.
"""

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
# The errors of a kernel or file system that does not support these flags.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def rename_to_free(source: Path, target: Path) -> None:
    """Give `source` the name `target`.

    Raises:
        FileExistsError: something has that name, even an empty folder or a dangling link; it is left unchanged.
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
    """Exchange the names of two folders.

    Args:
        new, old: two existing folders on the same file system.
        aside: a free name beside them, to which `old` is renamed if the file system cannot exchange names. A process
            that is killed in between leaves the content of `old` there.

    Raises:
        OSError: the exchange failed; both folders are unchanged.
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
    """Rename with a flag of `renameat2` and return True; return False if the system does not support the flag.

    Raises:
        OSError: the rename failed.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flag)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
