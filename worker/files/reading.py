"""Reading what a job wrote: text of any size, under a name that may be anything by now.

The folder itself must be one that only we can replace, such as ``jobs/<id>/files``.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from worker.files.opening import NotPlain, closing, is_plain, open_folder, open_plain

logger = logging.getLogger(__name__)

HEAD_BYTES = 64 * 1024
TAIL_BYTES = 256 * 1024


def size_of(path: Path) -> int | None:
    """Size in bytes of a regular file of its own; None where there is none.

    Raises OSError.
    """
    try:
        with closing(open_folder(path.parent)) as folder:
            found = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not is_plain(found):
        _warn(path)
        return None
    return found.st_size


def read_ends(path: Path) -> str:
    """The first and the last part of a text file that may be of any size; "" if it is missing.

    In whole lines: half a line could be half a URL, whose secrets nobody recognises. What is not
    a regular file of its own counts as missing.

    Raises OSError.
    """
    with _opened(path) as fd:
        if fd is None:
            return ""
        size = os.fstat(fd).st_size
        if size <= HEAD_BYTES + TAIL_BYTES:
            return _read(fd, 0, HEAD_BYTES + TAIL_BYTES).decode("utf-8", "replace")
        head, tail = _read(fd, 0, HEAD_BYTES), _read(fd, size - TAIL_BYTES, TAIL_BYTES)
    whole = head.rpartition(b"\n")[0] + b"\n" + tail.partition(b"\n")[2]
    return whole.decode("utf-8", "replace")


def read_tail(path: Path, size: int = 16 * 1024) -> str:
    """The last ``size`` bytes of a text file; "" if it is missing, as with :func:`read_ends`.

    Raises OSError.
    """
    with _opened(path) as fd:
        if fd is None:
            return ""
        start = max(0, os.fstat(fd).st_size - size)
        return _read(fd, start, size).decode("utf-8", "replace")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    try:
        with closing(open_folder(path.parent)) as folder:
            fd = open_plain(path.name, folder)
    except FileNotFoundError:
        yield None
        return
    except NotPlain:
        _warn(path)
        yield None
        return
    with closing(fd):
        yield fd


def _read(fd: int, start: int, size: int) -> bytes:
    """Up to so many bytes: fewer at the end of the file only."""
    parts = []
    while size > 0 and (part := os.pread(fd, size, start)):
        parts.append(part)
        start += len(part)
        size -= len(part)
    return b"".join(parts)


def _warn(path: Path) -> None:
    logger.warning(
        "%s is not a regular file of its own, so it is not read: the job put a link, a pipe or "
        "a folder there",
        path,
    )
