"""The ledger for those who only look: beside a running worker or without one, never changed.

A worker holds its ledger's lock, and keeps a log (``-wal``) and its index (``-shm``) beside the
file. A reader takes no part in that lock: it reads what SQLite lets it see, and makes, changes
and removes nothing, not even where it could (sqlite.org/wal.html, "Read-Only Databases").
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from worker.errors import LedgerError
from worker.ledger import reading, schema
from worker.ledger.entry import Entry
from worker.systemd.names import safe_id

_ATTEMPTS = 20
_PAUSE_SEC = 0.05
_PASSING = frozenset(
    {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_READONLY}
)
"""Errors of a moment in which a worker starts or ends."""


class _Moved(Exception):
    """A worker started or ended meanwhile, so what was read may be no whole. Says how."""


def newest(path: Path, limit: int) -> list[Entry]:
    """The newest entries of the ledger at ``path``, oldest first. Raises LedgerError."""
    return _read(path, "ORDER BY entry.id DESC LIMIT ?", limit)


def of_job(path: Path, job_id: str, limit: int) -> list[Entry]:
    """The newest entries of one job, oldest first; none if it is not known. Raises LedgerError.

    ``job_id`` is what the master calls it, or the name that its unit has for it.
    """
    names = (safe_id(job_id), job_id.encode("utf-8", "replace").decode())
    return _read(path, "WHERE name IN (?, ?) ORDER BY entry.id DESC LIMIT ?", *names, limit)


def _read(path: Path, which: str, *values: object) -> list[Entry]:
    problem = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_SEC)
        try:
            with _opened(path) as db:
                db.execute("BEGIN")  # all that follows is of one moment
                _check(db, path)
                return reading.entries(db, which, *values)[::-1]
        except _Moved as moved:
            problem = str(moved)
        except reading.Unreadable as error:
            raise schema.damaged(path, str(error)) from error
        except UnicodeDecodeError as error:
            raise schema.trouble(path, error) from error
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _PASSING:
                raise schema.trouble(path, error) from error
            problem = str(error)
        except FileNotFoundError as error:
            problem = f"{error.filename} is gone"
        except OSError as error:
            raise LedgerError(
                f"cannot read the ledger {path}: {error.strerror}; only root and the worker's own "
                "user may"
            ) from error
    raise LedgerError(f"cannot read the ledger {path}: {problem}; try again")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that cannot write. Raises _Moved at the end if it saw no whole."""
    before = _look(path)
    log, index = _beside(path)
    if index in before:
        # A worker has it open, or died with it. Without one SQLite keeps an index of its own.
        with contextlib.closing(_connection(path, "mode=ro&readonly_shm=1")) as db:
            yield db
        return
    if before.get(log, (0, 0, 0))[1]:
        with tempfile.TemporaryDirectory(prefix="ffmpeg-worker-history-") as folder:
            copy = Path(folder, path.name)
            for source, target in ((path, copy), (log, _beside(copy)[0])):
                shutil.copyfile(source, target)
            _require_same(path, before)
            with contextlib.closing(_connection(copy, "mode=rw")) as db:
                yield db
        return
    try:
        # Nothing but the file: no worker has it open, so nobody changes it, as far as one sees.
        with contextlib.closing(_connection(path, "mode=ro&immutable=1")) as db:
            yield db
    finally:
        _require_same(path, before)


def _connection(path: Path, how: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?{how}", uri=True, timeout=5.0, isolation_level=None
    )


def _beside(path: Path) -> tuple[Path, Path]:
    """The log and its index."""
    return path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")


def _look(path: Path) -> dict[Path, tuple[int, int, int]]:
    """What tells whether a file was replaced or written to, of each one that is there.

    Raises LedgerError if there is no ledger.
    """
    found: dict[Path, tuple[int, int, int]] = {}
    for file in (path, *_beside(path)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = file.lstat()
            found[file] = (status.st_ino, status.st_size, status.st_mtime_ns)
            if file == path and not stat.S_ISREG(status.st_mode):
                raise schema.damaged(path, "it is not a regular file")
    if path not in found:
        raise LedgerError(
            f"there is no ledger in {path.parent}: no worker has taken jobs there; if it has "
            "another work directory, name it with --work-dir, or the file that does with --config"
        )
    if not found[path][1]:
        raise schema.damaged(path, "the file is empty")
    if not os.access(path, os.R_OK):  # of which SQLite only says that it cannot open the file
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return found


def _require_same(path: Path, before: dict[Path, tuple[int, int, int]]) -> None:
    if _look(path) != before:
        raise _Moved("the files changed while they were read")


def _check(db: sqlite3.Connection, path: Path) -> None:
    """Raise LedgerError unless the file is a ledger that this program can read."""
    [[owner]] = db.execute("PRAGMA application_id")
    if owner != schema.APPLICATION_ID:
        raise schema.damaged(path, "it is a database of another program")
    [[version]] = db.execute("PRAGMA user_version")
    known = len(schema.MIGRATIONS)
    if version > known:
        raise LedgerError(
            f"the ledger {path} is of version {version}, and this program knows versions up to "
            f"{known}; use the program that the worker runs with"
        )
    if version < known:
        raise LedgerError(
            f"the ledger {path} is of the older version {version}; start the worker once, which "
            f"brings it to version {known}"
        )
