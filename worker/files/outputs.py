"""Where an output may go: beneath certain folders, and over nothing that is somebody else's."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.errors import JobError, Reason
from worker.files.beneath import InputFile, is_among, is_beneath, outside, resolve, walk
from worker.files.opening import FOLDER, closing, identity, magic
from worker.files.owner import Owner, user_name

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A name in an open folder."""

    folder: int
    name: str
    path: Path
    """With no link in it."""
    given: Path
    """As the job has it."""


@contextlib.contextmanager
def open_place(
    target: Path, dirs: Sequence[Path], private: Sequence[Path], mine: str
) -> Iterator[Place]:
    """Open the folder of an output, which must lie in or beneath one of ``dirs``.

    Raises JobError (``user_error``) if it lies elsewhere or is the worker's own; OSError.
    """
    path = _resolve(target, dirs, private, mine)
    with walk(path.parent) as (handle, _), closing(os.open(".", FOLDER, dir_fd=handle)) as folder:
        yield Place(folder, path.name, path, target)


def check_output(
    target: Path,
    source: InputFile | None,
    *,
    dirs: Sequence[Path],
    owner: Owner | None,
    private: Sequence[Path] = (),
    mine: str = "",
) -> None:
    """Raise JobError unless an output can be published at ``target`` as things are.

    ``private`` are patterns of names that belong to the worker (its own files, and ``kept_files``),
    but for ``mine``, the name beside them that this very job's output has by default.
    """
    path = _resolve(target, dirs, private, mine)
    folder = path.parent
    try:
        with walk(folder) as (handle, _):
            place = Place(handle, path.name, path, target)
            is_replaceable(place, owner, source)
            # Not by the mode alone: this tells of a mount that is read-only, too.
            writable = os.access(magic(handle), os.W_OK | os.X_OK)
    except (FileNotFoundError, NotADirectoryError):
        raise JobError(
            Reason.USER_ERROR,
            f"output folder {target.parent} does not exist on this node; make it first",
        ) from None
    except OSError as error:
        raise JobError(
            Reason.PLATFORM_ERROR, f"output {target} cannot be looked at: {error.strerror}"
        ) from error
    if not writable:
        raise JobError(
            Reason.PLATFORM_ERROR,
            f"output folder {target.parent} is not writable for the worker; allow it with "
            f"`systemctl edit ffmpeg-worker`, [Service] ReadWritePaths={folder}",
        )


def is_replaceable(place: Place, owner: Owner | None, source: InputFile | None = None) -> bool:
    """Whether there is a file that a new output may replace; False if there is nothing.

    That is a regular file with no other name, which belongs to the owner of outputs (without one:
    to whom we run as).

    Raises JobError (``user_error``) if something else is there; OSError.
    """
    target = place.given
    try:
        found = os.stat(place.name, dir_fd=place.folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(found.st_mode):
        raise JobError(Reason.USER_ERROR, f"output {target} is a folder; name a file")
    if source is not None and identity(found) == (source.device, source.inode):
        raise JobError(Reason.USER_ERROR, f"output {target} is the same file as the input")
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "not a regular file")
        raise _taken(target, f"it is {kind}", found, "remove it")
    if found.st_nlink != 1:
        raise _taken(target, "it has other names (hard links), too", found, "remove it")
    uid, name = (owner.uid, owner.name) if owner else (os.geteuid(), user_name(os.geteuid()))
    if found.st_uid != uid:
        what = f"remove it, give it to {name} (chown)"
        raise _taken(target, f"outputs replace only what belongs to {name}", found, what)
    return True


def _resolve(target: Path, dirs: Sequence[Path], private: Sequence[Path], mine: str) -> Path:
    """The target with no link in its folder's path. Its own name may be one: it is not followed.

    Raises JobError (``user_error``).
    """
    folder = resolve(target.parent, what="output folder")
    if folder is None or not is_beneath(folder, dirs):
        raise outside("output", target, "OUTPUT_DIRS", dirs)
    path = folder / target.name
    if is_among(path, private, mine):
        raise JobError(Reason.USER_ERROR, f"output {target} is among the worker's own files")
    return path


def _taken(target: Path, why: str, found: os.stat_result, what: str) -> JobError:
    return JobError(
        Reason.USER_ERROR,
        f"output {target} is there already and belongs to {user_name(found.st_uid)}: {why}; "
        f"{what} or choose another name",
    )
