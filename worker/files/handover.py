"""From one unit of a job to the next: a file becomes ours, for the jobs' group to read.

Each unit has a uid of its own and writes with umask 077, so the next one could not read it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from worker.errors import JobError, Reason
from worker.files.opening import (
    NotPlain,
    closing,
    is_plain,
    open_folder,
    open_plain,
    reason,
)

READABLE = 0o640
ACL = "system.posix_acl_access"
"""The extended attribute: acl(5)."""
_NO_ACL = (errno.ENODATA, errno.EOPNOTSUPP)


def make_readable(path: Path, group: int | None) -> int | None:
    """Make a job's file ours, readable for ``group``; its size in bytes, None if there is none.

    Without a group it is only looked at. To be called when the unit that wrote it has no process
    left. May be repeated.

    Raises JobError: ``runtime_error`` if it is not a regular file of its own.
    """
    try:
        with closing(open_folder(path.parent)) as folder:
            return _make_ours(path.name, folder, group)
    except OSError as error:
        raise _failure(path, error) from error


def take(name: str, source: Path, home: Path, group: int | None) -> int | None:
    """Move a job's file out of its reach, and make it readable; its size, None if there is none.

    What was moved before, by an agent that died then, stays.

    Raises JobError: ``runtime_error`` if it is not a regular file of its own.
    """
    try:
        with closing(open_folder(home)) as target:
            if not _exists(name, target):
                with closing(open_folder(source)) as folder:
                    if not _exists(name, folder):
                        return None
                    # Looked at here, so that only a file comes among ours, and again by what it
                    # is opened as: meanwhile it may have become another.
                    if not is_plain(os.stat(name, dir_fd=folder, follow_symlinks=False)):
                        raise NotPlain
                    os.rename(name, name, src_dir_fd=folder, dst_dir_fd=target)
            return _make_ours(name, target, group)
    except OSError as error:
        raise _failure(source / name, error) from error


def own(fd: int, uid: int, gid: int, mode: int) -> None:
    """Give an open file to somebody, and take away what rights others had in it.

    Raises OSError.
    """
    us = os.geteuid()
    if os.fstat(fd).st_uid != us:
        os.fchown(fd, us, -1)  # only its owner may do what follows
    try:
        os.removexattr(fd, ACL)
    except OSError as error:
        if error.errno not in _NO_ACL:
            raise
    os.fchmod(fd, mode)
    if (us, os.fstat(fd).st_gid) != (uid, gid):
        os.fchown(fd, uid, gid)


def _make_ours(name: str, folder: int, group: int | None) -> int | None:
    try:
        fd = open_plain(name, folder)
    except FileNotFoundError:
        return None
    with closing(fd):
        if group is not None:
            own(fd, os.geteuid(), group, READABLE)
        return os.fstat(fd).st_size


def _exists(name: str, folder: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        os.stat(name, dir_fd=folder, follow_symlinks=False)
        return True
    return False


def _failure(path: Path, error: OSError) -> JobError:
    if isinstance(error, NotPlain):
        return JobError(
            Reason.RUNTIME_ERROR,
            f"ffmpeg ended well but {path.name} is not a regular file of its own: the job put "
            "something else in its place",
        )
    return JobError(reason(error), f"cannot take over {path}: {error.strerror}")
