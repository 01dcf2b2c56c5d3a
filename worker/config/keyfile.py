"""The API key from a file of its own (``MASTER_API_KEY_FILE``)."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_LARGEST = 8192
_GROUP_OR_OTHERS = stat.S_IRGRP | stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH


def read_key_file(path: Path) -> str:
    """The first line, without blanks around it.

    Raises ValueError, which says what is wrong with the file and nothing of what is in it.
    """
    try:
        # Without O_NONBLOCK a FIFO would hold us up before it can be turned down.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            _check(os.fstat(descriptor))
            data = os.read(descriptor, _LARGEST)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    key = data.partition(b"\n")[0].decode("ascii", "replace").strip()
    if not key:
        raise ValueError("has no key in its first line")
    return key


def _check(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("must be a regular file")
    if status.st_uid not in (0, os.geteuid()):
        raise ValueError("must be owned by root, or by the user that the worker runs as")
    if status.st_mode & _GROUP_OR_OTHERS:
        raise ValueError("must be for its owner alone: chmod 600 it")
