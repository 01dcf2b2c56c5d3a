"""The files of one job: a private folder while it runs, a published output when it is done.

Jobs are children of PID 1, not of the agent, so their files live where both see the same
thing: ``<work-dir>/jobs/<id>/``. The folder is locked (flock(2)) for as long as a process of
ours is responsible for the job; a folder without a lock was left behind by a crash.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from worker.errors import JobError, Reason, WorkerError

logger = logging.getLogger(__name__)

HEAD_BYTES = 64 * 1024
TAIL_BYTES = 256 * 1024
_PUBLISHING = "publishing.json"


class Workspace:
    """The locked folder of one job. Use :meth:`create`; :meth:`remove` ends it."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock

    @classmethod
    def create(cls, jobs_dir: Path, name: str) -> Workspace:
        """Make and lock ``jobs_dir/name``, replacing what a crashed run left there.

        ``name`` must be a plain file name (``worker.systemd.names.safe_id``).

        Raises JobError if another process holds the folder, or if it cannot be made.
        """
        path = jobs_dir / name
        try:
            make_private(jobs_dir)
            lock = _fresh(path)
        except OSError as error:
            raise JobError(
                reason(error),
                f"cannot make the job's folder {path}: {error.strerror}",
            ) from error
        if lock is None:
            raise JobError(
                Reason.PLATFORM_ERROR, f"another process is running this job already ({path})"
            )
        return cls(path, lock)

    @classmethod
    def reopen(cls, jobs_dir: Path, name: str) -> Workspace:
        """Take over ``jobs_dir/name`` with all that is in it; made if it is missing.

        Raises JobError as :meth:`create` does.
        """
        path = jobs_dir / name
        try:
            make_private(path)
            lock = try_lock(path)
        except OSError as error:
            raise JobError(
                reason(error), f"cannot use the job's folder {path}: {error.strerror}"
            ) from error
        if lock is None:
            raise JobError(
                Reason.PLATFORM_ERROR, f"another process is running this job already ({path})"
            )
        return cls(path, lock)

    def let_go(self) -> None:
        """Unlock the folder as it is, for the next agent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def publishing(self, staged: Path, target: Path) -> None:
        """Note what is about to be published, so that a later agent can tell that it was.

        Raises OSError.
        """
        found = staged.lstat()
        note = {"target": str(target), "device": found.st_dev, "inode": found.st_ino}
        (self.path / _PUBLISHING).write_text(json.dumps(note), encoding="ascii")

    def published(self) -> Path | None:
        """Where the output is already, noted by :meth:`publishing` and renamed since."""
        try:
            note = json.loads((self.path / _PUBLISHING).read_bytes())
            target = Path(note["target"])
            found = target.lstat()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        same = (found.st_dev, found.st_ino) == (note.get("device"), note.get("inode"))
        return target if same else None

    def stdout(self, step: str) -> Path:
        """Where systemd appends the standard output of a step's unit."""
        return self.path / f"{step}.out"

    def log(self, step: str) -> Path:
        """Where ffmpeg writes its own log of a step."""
        return self.path / f"{step}.log"

    def clear(self) -> None:
        """Delete what is in the folder. The empty folder still says that the job is held.

        What cannot be deleted is named in the log.
        """
        try:
            for path in self.path.iterdir():
                if path.is_dir() and not path.is_symlink():
                    remove_tree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot clear %s: %s", self.path, error)

    def remove(self) -> None:
        """Delete the folder with all that is in it, and let go of the lock; may be repeated."""
        if self._lock is not None:
            remove_tree(self.path)
            os.close(self._lock)
            self._lock = None


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


def remove_tree(path: Path) -> None:
    """Delete a folder; what cannot be deleted is named in the log."""

    def report(_function: object, name: str, info: tuple[type, BaseException, object]) -> None:
        if not isinstance(info[1], FileNotFoundError):
            logger.warning("cannot remove %s: %s; remove it by hand", name, info[1])

    shutil.rmtree(path, onerror=report)


def size_of(path: Path) -> int | None:
    """Size in bytes of a regular file; None where there is none."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def read_ends(path: Path) -> str:
    """The first and the last part of a text file that may be of any size; "" if it is missing.

    In whole lines: half a line could be half a URL, whose secrets nobody recognises.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            size = os.fstat(file.fileno()).st_size
            if size <= HEAD_BYTES + TAIL_BYTES:
                return (head + file.read(TAIL_BYTES)).decode("utf-8", "replace")
            file.seek(size - TAIL_BYTES)
            tail = file.read(TAIL_BYTES)
    except FileNotFoundError:
        return ""
    whole = head.rpartition(b"\n")[0] + b"\n" + tail.partition(b"\n")[2]
    return whole.decode("utf-8", "replace")


def read_tail(path: Path, size: int = 16 * 1024) -> str:
    """The last part of a text file; "" if it is missing."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            return file.read(size).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def check_input(path: Path) -> int:
    """Size in bytes of a job's input file.

    Raises JobError (``input_error``) unless it is a regular, readable, non-empty file.
    """
    try:
        found = path.stat()
        # Looked at before it is opened: opening a named pipe would wait for its writer.
        if not stat.S_ISREG(found.st_mode):
            raise JobError(Reason.INPUT_ERROR, f"input {path} is not a regular file")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise JobError(Reason.INPUT_ERROR, f"input {path} does not exist on this node") from None
    except OSError as error:
        raise JobError(
            Reason.INPUT_ERROR, f"input {path} cannot be read: {error.strerror}"
        ) from error
    if found.st_size == 0:
        raise JobError(Reason.INPUT_ERROR, f"input {path} is empty")
    return found.st_size


def check_output(path: Path, source: Path | None, private: Path | None = None) -> None:
    """Raise JobError unless an output can be published at ``path`` when it is done.

    Below ``private`` lie the folders of jobs, which are deleted with all that is in them.
    """
    folder = path.parent
    try:
        if not folder.is_dir():
            raise JobError(
                Reason.USER_ERROR,
                f"output folder {folder} does not exist on this node; make it first",
            )
        if path.is_dir():
            raise JobError(Reason.USER_ERROR, f"output {path} is a folder; name a file")
        if source is not None and path.exists() and path.samefile(source):
            raise JobError(Reason.USER_ERROR, f"output {path} is the same file as the input")
        if private is not None and folder.resolve().is_relative_to(private.resolve()):
            raise JobError(Reason.USER_ERROR, f"output {path} is among the worker's own files")
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise JobError(
            Reason.PLATFORM_ERROR, f"output {path} cannot be looked at: {error.strerror}"
        ) from error
    if not writable:
        raise JobError(
            Reason.PLATFORM_ERROR,
            f"output folder {folder} is not writable for the worker; allow it with "
            f"`systemctl edit ffmpeg-worker`, [Service] ReadWritePaths={folder}",
        )


def publish(staged: Path, target: Path, *, copy: bool = False) -> int:
    """Put a finished file under its final name, whole or not at all; its size in bytes.

    A rename where that is possible, else a copy beside the target and then the rename; always
    so with ``copy``, which leaves ``staged`` where it is. A symbolic link at ``target`` is
    replaced, never followed.

    Raises JobError if the target's folder refuses it.
    """
    try:
        size = _finish(staged)
        try:
            if copy:
                _copy_beside(staged, target)
            else:
                staged.replace(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy_beside(staged, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise JobError(
            reason(error),
            f"cannot publish the output as {target}: {error.strerror}",
        ) from error
    return size


def _copy_beside(staged: Path, target: Path) -> None:
    # Named after the target as far as NAME_MAX allows, so that its owner can tell what it is.
    start = target.name.encode()[:200].decode(errors="ignore")
    part = target.with_name(f".{start}.{secrets.token_hex(4)}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as copy, staged.open("rb") as source:
            shutil.copyfileobj(source, copy, 1024 * 1024)
            os.fchmod(copy.fileno(), 0o644)
            copy.flush()
            os.fsync(copy.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _finish(staged: Path) -> int:
    """Give a finished file its final mode, put it on the disk (fsync(2)); its size."""
    fd = os.open(staged, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise OSError(errno.EINVAL, "it is not a regular file of its own")
        os.fchmod(fd, 0o644)
        os.fsync(fd)
        return found.st_size
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def reason(error: OSError) -> Reason:
    """Whose fault it is that a file of ours could not be used."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return Reason.RESOURCE_ERROR if full else Reason.PLATFORM_ERROR


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
