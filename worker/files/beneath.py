"""Inputs: files that must lie beneath certain folders, whatever links somebody makes meanwhile.

A path is resolved once. What comes out is free of links, and is then walked from ``/`` down, each
component opened relative to the one above and never through a link: whoever swaps a folder for a
link between the two gets an error, and no file that lies elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import grp
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from worker.errors import JobError, Reason
from worker.files.handover import ACL
from worker.files.opening import FILE, LOOK, closing, identity, magic, reopen

_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What a job may not have in the path that it names; nor in one that a link leads to."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A job's input as it was found."""

    path: Path
    """Without any link."""
    size: int
    """Bytes."""
    device: int
    inode: int
    steady: bool
    """Nobody but root, and whom we run as, can put another file under this path."""


def kept_files(work_dir: Path) -> tuple[Path, ...]:
    """Where inputs and outputs of jobs are kept, as patterns: no output that a job may name."""
    return tuple(work_dir / name for name in ("input_*", "job_*_output.*"))


def resolve_input(
    path: Path, dirs: Sequence[Path], *, gid: int | None, private: Sequence[Path] = ()
) -> InputFile:
    """Find a job's input, which must lie beneath one of ``dirs`` and be readable for ``gid``.

    ``gid`` is the group of all jobs; None: they run as we do. ``private`` are patterns of what is
    never an input: the worker's own files.

    Raises JobError: ``user_error`` if it lies elsewhere, which does not tell whether it exists;
    ``input_error`` unless it is a regular, readable, non-empty file.
    """
    real = resolve(path, what="input")
    if real is None or not is_beneath(real, dirs):
        raise outside("input", path, "INPUT_DIRS", dirs)
    if is_among(real, private):
        raise JobError(Reason.USER_ERROR, f"input {path} is among the worker's own files")
    if _UNSAFE.search(str(real)):
        raise JobError(
            Reason.INPUT_ERROR,
            f"input {path} is a link to {str(real)!a}: not a plain UTF-8 path; rename that file",
        )
    try:
        with walk(real.parent) as (folder, above), closing(_look(real.name, folder)) as handle:
            found = os.fstat(handle)
            # Looked at before it is opened: opening a named pipe would wait for its writer, and
            # opening a device may set it going.
            if not stat.S_ISREG(found.st_mode):
                raise JobError(Reason.INPUT_ERROR, f"input {path} is not a regular file")
            os.close(reopen(handle, FILE))
            readable = gid is None or _readable(handle, found, gid)
    except FileNotFoundError:
        raise JobError(Reason.INPUT_ERROR, f"input {path} does not exist on this node") from None
    except OSError as error:
        raise JobError(
            Reason.INPUT_ERROR, f"input {path} cannot be read: {error.strerror}"
        ) from error
    if gid is not None and not readable:
        group = _group_name(gid)
        raise JobError(
            Reason.INPUT_ERROR,
            f"input {path} cannot be read by jobs: allow it with `chgrp {group}` and "
            "`chmod g+r`, or with `chmod o+r`",
        )
    if found.st_size == 0:
        raise JobError(Reason.INPUT_ERROR, f"input {path} is empty")
    steady = is_steady([*above, found])
    return InputFile(real, found.st_size, found.st_dev, found.st_ino, steady)


@contextlib.contextmanager
def opened(found: InputFile) -> Iterator[int]:
    """Open the input that was found. Raises OSError if another one has its path by now."""
    with walk(found.path.parent) as (folder, _), closing(_look(found.path.name, folder)) as handle:
        if identity(os.fstat(handle)) != (found.device, found.inode):
            raise OSError(errno.ESTALE, "it was replaced meanwhile")
        with closing(reopen(handle, FILE)) as fd:
            yield fd


def is_that_file(pid: int, found: InputFile) -> bool | None:
    """Whether a process sees that very file under its path; None if the process is gone.

    Raises OSError: PermissionError unless we may trace it (CAP_SYS_PTRACE for another user's),
    see proc(5), /proc/PID/root.
    """
    try:
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return None
    with closing(root):
        try:
            seen = os.stat(str(found.path)[1:], dir_fd=root, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return (seen.st_dev, seen.st_ino) == (found.device, found.inode)


def resolve(path: Path, *, what: str) -> Path | None:
    """The path without its links, as far as it exists; None if that is too hard.

    Raises JobError (``user_error``).
    """
    if ".." in path.parts:  # it would tell what is a link elsewhere, and what is not
        raise JobError(Reason.USER_ERROR, f"{what} {path} must not contain ..")
    try:
        return Path(os.path.realpath(path))
    except (RecursionError, OSError):  # a chain of a thousand links
        return None


def is_beneath(real: Path, dirs: Sequence[Path]) -> bool:
    """Whether a path without links is, or lies beneath, one of ``dirs``, which may be links."""
    return any(real.is_relative_to(os.path.realpath(folder)) for folder in dirs)


def outside(what: str, path: Path, key: str, dirs: Sequence[Path]) -> JobError:
    """Does not tell whether there is anything at ``path``."""
    names = ", ".join(map(str, dirs))
    return JobError(Reason.USER_ERROR, f"{what} {path} lies outside of {key} ({names})")


def is_among(real: Path, patterns: Sequence[Path], mine: str = "") -> bool:
    """Whether a path without links is, or lies below, what one of ``patterns`` means.

    The last component of each may have wildcards. A name ``mine`` beside them is exempt.
    """
    for pattern in patterns:
        folder = Path(os.path.realpath(pattern.parent))
        if real == folder or not real.is_relative_to(folder):
            continue
        name, *below = real.relative_to(folder).parts
        if fnmatch.fnmatchcase(name, pattern.name) and (below or name != mine):
            return True
    return False


@contextlib.contextmanager
def walk(folder: Path) -> Iterator[tuple[int, list[os.stat_result]]]:
    """Open a folder by a path without links; a handle, and what each from ``/`` to it is.

    Raises OSError: NotADirectoryError if one of them is a link by now.
    """
    if len(os.fsencode(folder)) >= os.pathconf("/", "PC_PATH_MAX"):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    handle = os.open("/", LOOK | os.O_DIRECTORY)
    try:
        above = [os.fstat(handle)]
        for name in folder.parts[1:]:
            below = os.open(name, LOOK | os.O_DIRECTORY, dir_fd=handle)
            os.close(handle)
            handle = below
            above.append(os.fstat(handle))
        yield handle, above
    finally:
        os.close(handle)


def is_steady(way: Sequence[os.stat_result]) -> bool:
    """Whether nobody but root, and whom we run as, can replace one of these by another.

    ``way`` leads from ``/`` down. What others may write to is safe where it is sticky (inode(7)),
    for what belongs to somebody else. Rights by access lists show in the mode of the group.
    """
    trusted = (0, os.geteuid())
    return all(
        folder.st_uid in trusted
        and (
            not folder.st_mode & 0o022
            or bool(folder.st_mode & stat.S_ISVTX and below.st_uid in trusted)
        )
        for folder, below in pairwise(way)
    )


def _look(name: str, folder: int) -> int:
    return os.open(name, LOOK, dir_fd=folder)


def _readable(handle: int, found: os.stat_result, gid: int) -> bool:
    """Whether a job may read it, which has a uid of its own. An access list is left to decide."""
    bit = stat.S_IRGRP if found.st_gid == gid else stat.S_IROTH
    if found.st_mode & bit:
        return True
    with contextlib.suppress(OSError):
        return bool(os.getxattr(magic(handle), ACL))
    return False


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
