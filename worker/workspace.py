"""The files of one job: a private folder while it runs.

Jobs are children of PID 1, not of the agent, so their files live where both see the same thing:
``<work-dir>/jobs/<id>/`` is the agent's own, and only ``files/`` in it is the job's. What is in
there is hostile. The folder is locked (flock(2)) for as long as a process of ours is responsible
for the job; a folder without a lock was left behind by a crash.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from worker.errors import JobError, Reason, WorkerError
from worker.files import handover, removal
from worker.files.beneath import InputFile, opened
from worker.files.handover import READABLE, own
from worker.files.opening import closing, identity, magic, open_folder, reason
from worker.files.publish import drop_other_name
from worker.files.reading import read_ends, read_tail, size_of
from worker.files.removal import remove_tree

__all__ = [
    "Workspace",
    "abandoned",
    "make_private",
    "read_ends",
    "read_tail",
    "reason",
    "remove_tree",
    "require_work_dir",
    "size_of",
    "try_lock",
    "using",
]

logger = logging.getLogger(__name__)

_FILES = "files"
_PUBLISHING = "publishing.json"
_SECRETS = "stream.options"


class Workspace:
    """The locked folder of one job. Use :meth:`create`; :meth:`remove` ends it.

    ``group`` is that of all jobs, which may write to ``files/`` then; None: jobs run as we do.
    """

    def __init__(self, path: Path, lock: int, group: int | None = None) -> None:
        self.path = path
        self._lock: int | None = lock
        self._group = group

    @classmethod
    def create(cls, jobs_dir: Path, name: str, group: int | None = None) -> Workspace:
        """Make and lock ``jobs_dir/name``, replacing what a crashed run left there.

        ``name`` must be a plain file name (``worker.systemd.names.safe_id``).

        Raises JobError if another process holds the folder, or if it cannot be made.
        """
        path = jobs_dir / name
        try:
            make_private(jobs_dir)
            return cls._locked(path, _fresh(path), group)
        except OSError as error:
            raise JobError(
                reason(error),
                f"cannot make the job's folder {path}: {error.strerror}",
            ) from error

    @classmethod
    def reopen(cls, jobs_dir: Path, name: str, group: int | None = None) -> Workspace:
        """Take over ``jobs_dir/name`` with all that is in it; made if it is missing.

        Raises JobError as :meth:`create` does.
        """
        path = jobs_dir / name
        try:
            make_private(path)
            return cls._locked(path, try_lock(path), group)
        except OSError as error:
            raise JobError(
                reason(error), f"cannot use the job's folder {path}: {error.strerror}"
            ) from error

    @classmethod
    def _locked(cls, path: Path, lock: int | None, group: int | None) -> Workspace:
        if lock is None:
            raise JobError(
                Reason.PLATFORM_ERROR, f"another process is running this job already ({path})"
            )
        try:
            _make_files(lock, group)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, lock, group)

    @property
    def files(self) -> Path:
        """The job's own folder, the only one that it can write to."""
        return self.path / _FILES

    def stdout(self, step: str) -> Path:
        """Where systemd appends the standard output of a step's unit."""
        return self.path / f"{step}.out"

    def log(self, step: str) -> Path:
        """Where ffmpeg writes its own log of a step."""
        return self.files / f"{step}.log"

    def input(self) -> Path:
        """Where a unit of the job makes its test input."""
        return self.files / "input.mp4"

    def output(self, suffix: str) -> Path:
        """Where the job writes its output."""
        return self.files / f"output{suffix}"

    def pin(self, found: InputFile) -> InputFile:
        """An input that nobody can replace any more: its file under a name of ours, or a copy.

        Raises OSError.
        """
        path = self.path / f"given{found.path.suffix}"
        path.unlink(missing_ok=True)
        with opened(found) as fd:
            try:
                # With a folder's descriptor this is linkat(2), which can follow a link.
                os.link(magic(fd), path.name, dst_dir_fd=self._lock, follow_symlinks=True)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                    raise
                with os.fdopen(os.dup(fd), "rb") as source, path.open("xb") as copy:
                    shutil.copyfileobj(source, copy, 1024 * 1024)
                    if self._group is not None:
                        own(copy.fileno(), os.geteuid(), self._group, READABLE)
        status = path.stat()
        return replace(found, path=path, device=status.st_dev, inode=status.st_ino, steady=True)

    def take_input(self) -> int | None:
        """Make the test input ours, for the next unit to read; its size, None if there is none.

        Raises JobError: ``runtime_error`` if it is not a regular file of its own.
        """
        return handover.make_readable(self.input(), self._group)

    def take_output(self, suffix: str) -> Path | None:
        """Move the output out of the job's reach, readable for the next unit; None: there is none.

        To be called when the job's unit has no process left, and before it is published; may be
        repeated until then, also by a later agent.

        Raises JobError: ``runtime_error`` if it is not a regular file of its own.
        """
        name = self.output(suffix).name
        size = handover.take(name, self.files, self.path, self._group)
        return None if size is None else self.path / name

    def write_secrets(self, text: str) -> Path:
        """A file that the job can read and nobody else, unless they are root. Raises OSError."""
        path = self.path / _SECRETS
        path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            if self._group is not None:
                os.fchown(file.fileno(), -1, self._group)
                os.fchmod(file.fileno(), 0o640)
        return path

    def publishing(self, staged: Path, target: Path) -> None:
        """Note what is about to be published, so that a later agent can tell that it was.

        Raises OSError.
        """
        found = staged.lstat()
        note = {
            "staged": str(staged),
            "target": str(target),
            "device": found.st_dev,
            "inode": found.st_ino,
        }
        (self.path / _PUBLISHING).write_text(json.dumps(note), encoding="ascii")

    def published(self) -> Path | None:
        """Where the output is already: noted by :meth:`publishing`, and given its name since.

        To be asked before :meth:`take_output`. Where the agent died when the file had both names,
        the first one goes now.
        """
        try:
            note = json.loads((self.path / _PUBLISHING).read_bytes())
            target = Path(note["target"])
            found = target.lstat()
            if identity(found) != (note["device"], note["inode"]):
                return None
            if "staged" in note:  # which an earlier version did not write down
                drop_other_name(Path(note["staged"]), found)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return target

    def let_go(self) -> None:
        """Unlock the folder as it is, for the next agent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def clear(self) -> None:
        """Delete what is in the folder. The empty folder still says that the job is held.

        What cannot be deleted is named in the log. Takes as long as the job made it take, see
        ``worker.files.removal``.
        """
        if self._lock is not None:
            removal.empty(self.path, self._lock)

    def remove(self) -> None:
        """Delete the folder with all that is in it, and let go of the lock; may be repeated."""
        if self._lock is not None:
            remove_tree(self.path)
            os.close(self._lock)
            self._lock = None


def _make_files(folder: int, group: int | None) -> None:
    """Make ``files/``, which a version before this one did not have."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(_FILES, 0o700, dir_fd=folder)
    with closing(open_folder(_FILES, folder)) as files:
        if group is not None:
            os.fchown(files, -1, group)
            os.fchmod(files, 0o770)


def _fresh(path: Path) -> int | None:
    """An empty, locked folder; None if another process holds it."""
    if path.exists():
        lock = try_lock(path)
        if lock is None:
            return None
        os.close(lock)
        remove_tree(path)
    path.mkdir(mode=0o700)
    return try_lock(path)


def make_private(folder: Path) -> None:
    """Make ``folder``, and those above it that are missing, for their owner only."""
    if not folder.parent.exists():
        make_private(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def try_lock(folder: Path) -> int | None:
    """Lock a folder against other processes; None if one of them holds it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def abandoned(jobs_dir: Path) -> Iterator[Path]:
    """The job folders under ``jobs_dir`` whose process died without cleaning up."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(jobs_dir.iterdir()):
            if path.is_symlink() or not path.is_dir():
                continue
            lock = try_lock(path)
            if lock is not None:
                os.close(lock)
                yield path


def require_work_dir(work_dir: Path) -> Path:
    """The folder for job folders under ``work_dir``, made if need be.

    Raises WorkerError with what to do if that is not possible.
    """
    jobs_dir = work_dir / "jobs"
    with using(work_dir):
        make_private(jobs_dir)
    return jobs_dir


@contextlib.contextmanager
def using(work_dir: Path) -> Iterator[None]:
    """Turn an OSError into a WorkerError that says what to do about the work directory."""
    try:
        yield
    except OSError as error:
        raise WorkerError(
            f"cannot use the work directory {work_dir}: {error.strerror}; "
            "make it writable or choose another with WORK_DIR (--work-dir)"
        ) from error
