"""Putting a finished file under its final name, whole or not at all, in anybody's folder.

Everything is done relative to the target's folder, which was opened without following a link. A
file is given its owner, its mode and its place on the disk before it has its name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from worker.errors import JobError, Reason
from worker.files.beneath import walk
from worker.files.handover import own
from worker.files.opening import closing, identity, magic, open_folder, open_plain, reason
from worker.files.outputs import Place, check_output, is_replaceable, open_place
from worker.files.owner import Owner, owner_of

__all__ = ["Owner", "check_output", "drop_other_name", "owner_of", "publish"]

PUBLISHED = 0o644
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""What link(2) says on a file system without hard links."""

Note = Callable[[Path, Path], None]
"""Told, just before, which file becomes which; neither path has a link in its folder. May be told
twice, with another file the second time, where the first could not be moved."""


def publish(
    staged: Path,
    target: Path,
    *,
    dirs: Sequence[Path],
    owner: Owner | None,
    private: Sequence[Path] = (),
    mine: str = "",
    copy: bool = False,
    note: Note | None = None,
) -> int:
    """Publish a file of our own as ``target``; its size in bytes.

    It is moved where that is possible, else copied beside the target first; always so with
    ``copy``, which leaves ``staged`` where it is. For the other arguments see ``check_output``,
    which has said yes to this before.

    A file that appears at ``target`` meanwhile is not overwritten. One that was there may be
    replaced (``is_replaceable``); should somebody who may write in the folder swap that one for
    another at this very moment, the other's name goes, but never its content.

    Raises JobError.
    """
    try:
        with (
            closing(open_folder(staged.parent)) as home,
            closing(open_plain(staged.name, home)) as source,
            open_place(target, dirs, private, mine) as place,
        ):
            is_replaceable(place, owner)
            if copy:
                _publish_copy(source, place, owner, note)
            else:
                try:
                    _finish(source, staged, home, place, owner, note)
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                    _publish_copy(source, place, owner, note)
            os.fsync(place.folder)
            return os.fstat(source).st_size
    except FileExistsError:
        raise JobError(
            Reason.USER_ERROR,
            f"output {target} appeared while the job ran, so it is not overwritten; remove it or "
            "choose another name",
        ) from None
    except OSError as error:
        raise JobError(
            reason(error), f"cannot publish the output as {target}: {error.strerror}"
        ) from error


def drop_other_name(path: Path, found: os.stat_result) -> None:
    """Remove the name that a file had before it was published, if it still has it.

    Raises OSError.
    """
    if found.st_nlink == 1:
        return
    with contextlib.suppress(FileNotFoundError), walk(path.parent.resolve()) as (folder, _):
        if identity(os.stat(path.name, dir_fd=folder, follow_symlinks=False)) == identity(found):
            os.unlink(path.name, dir_fd=folder)


def _publish_copy(source: int, place: Place, owner: Owner | None, note: Note | None) -> None:
    # Named after the target as far as NAME_MAX allows, so that its owner can tell what it is; and
    # after the source, so that an agent that died over it is followed by one that finds it.
    start = os.fsencode(place.name)[:200].decode(errors="ignore")
    part = place.path.with_name(f".{start}.{os.fstat(source).st_ino:x}.part")
    try:
        fd = os.open(part.name, _NEW, 0o600, dir_fd=place.folder)
    except FileExistsError:
        os.unlink(part.name, dir_fd=place.folder)
        fd = os.open(part.name, _NEW, 0o600, dir_fd=place.folder)
    try:
        with os.fdopen(fd, "wb") as copy, os.fdopen(os.dup(source), "rb") as original:
            original.seek(0)
            shutil.copyfileobj(original, copy, 1024 * 1024)
            copy.flush()
            _finish(copy.fileno(), part, place.folder, place, owner, note)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part.name, dir_fd=place.folder)
        raise


def _finish(
    fd: int, path: Path, folder: int, place: Place, owner: Owner | None, note: Note | None
) -> None:
    """Make an open file what it shall be and give it its name; now it is ``path`` in ``folder``.

    Raises JobError, OSError.
    """
    found = os.fstat(fd)
    uid, gid = (owner.uid, owner.gid) if owner else (found.st_uid, found.st_gid)
    own(fd, uid, gid, PUBLISHED)
    os.fsync(fd)
    if note is not None:
        note(path, place.path)
    if is_replaceable(place, owner):
        os.replace(path.name, place.name, src_dir_fd=folder, dst_dir_fd=place.folder)
        return
    try:
        # By the descriptor: in a folder of others the name may stand for another file by now.
        os.link(magic(fd), place.name, dst_dir_fd=place.folder)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_to_free(path.name, folder, place)
    else:
        os.unlink(path.name, dir_fd=folder)


def _rename_to_free(name: str, folder: int, place: Place) -> None:
    """Rename to a name that nobody has, as link(2) would, by having it first ourselves."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    os.close(os.open(place.name, flags, 0o600, dir_fd=place.folder))
    try:
        os.rename(name, place.name, src_dir_fd=folder, dst_dir_fd=place.folder)
    except BaseException:
        os.unlink(place.name, dir_fd=place.folder)
        raise
