"""Opening one name in one folder: never through a link, never waiting for a pipe or a device."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from worker.errors import Reason

LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
"""A handle to look at, whatever it is, without opening it: open(2), O_PATH."""
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
"""Does not wait for the holder of a lease on the file, either: fcntl(2), F_SETLEASE."""


class NotPlain(OSError):
    """What is there is not a regular file, or one that has other names, too."""

    def __init__(self) -> None:
        super().__init__(errno.EINVAL, "it is not a regular file of its own")


def open_folder(path: Path | str, dir_fd: int | None = None) -> int:
    """Open a folder for reading. A link is not followed (OSError, ENOTDIR)."""
    return os.open(path, FOLDER, dir_fd=dir_fd)


def open_plain(name: str, dir_fd: int) -> int:
    """Open a regular file that has no other name, for reading.

    Raises NotPlain for anything else, FileNotFoundError, OSError.
    """
    with closing(os.open(name, LOOK, dir_fd=dir_fd)) as handle:
        if not is_plain(os.fstat(handle)):
            raise NotPlain
        return reopen(handle, FILE)


def is_plain(found: os.stat_result) -> bool:
    """Whether it is a regular file that has one name only."""
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def reopen(handle: int, flags: int) -> int:
    """Open what a handle stands for, whatever has its name by now: proc(5), /proc/PID/fd."""
    return os.open(magic(handle), flags | os.O_CLOEXEC)


def magic(handle: int) -> str:
    """A path that means what a descriptor stands for."""
    return f"/proc/self/fd/{handle}"


def identity(found: os.stat_result) -> tuple[int, int]:
    """What tells a file from all others, for as long as it exists."""
    return found.st_dev, found.st_ino


def reason(error: OSError) -> Reason:
    """Whose fault it is that a file of ours could not be used."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return Reason.RESOURCE_ERROR if full else Reason.PLATFORM_ERROR


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    """Close a descriptor at the end."""
    try:
        yield fd
    finally:
        os.close(fd)
