"""The ledger's file as one process holds it: lock, transactions, and whether it can be written."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from worker import workspace
from worker.errors import LedgerError
from worker.ledger import schema
from worker.ledger.entry import to_json
from worker.ledger.reading import Unreadable

ROOM_BYTES = 4 * 1024 * 1024
"""With less free space than this no job should be taken: its result might find none."""


class File:
    """May be used from any thread: transactions wait for each other."""

    def __init__(self, path: Path, migrations: Sequence[str]) -> None:
        """Raises LedgerError (see ``schema.connect``), also if another worker holds the folder."""
        self.path = path
        self._one_by_one = threading.RLock()
        self._failed = False
        self._lock: int | None = hold(path.parent)
        try:
            self._db = schema.connect(path, migrations)
            self._opened = _identity(path)
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """May be repeated."""
        if self._lock is not None:
            self._db.close()
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Turns what goes wrong into LedgerError."""
        with self._one_by_one:
            try:
                yield self._db
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise schema.trouble(self.path, error) from error
            except Unreadable as error:
                raise schema.damaged(self.path, str(error)) from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, which is committed at the end, or rolled back."""
        try:
            with self.reading() as db:
                self._in_place()
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                    db.execute("COMMIT")
                finally:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
        except LedgerError:
            self._failed = True
            raise
        self._failed = False

    def trouble(self) -> str:
        """Why nothing can be written now, empty if it can be."""
        try:
            self._in_place()
            space = os.statvfs(self.path)
            if space.f_flag & os.ST_RDONLY:
                return f"the ledger {self.path} is on a file system that is mounted read-only"
            free = space.f_bavail * space.f_frsize
            if free < ROOM_BYTES:
                return f"the disk of the ledger {self.path} is full ({free} bytes free); free some"
            if self._failed:
                with self.writing() as db:
                    value = to_json(os.urandom(8).hex())
                    db.execute("REPLACE INTO meta (name, value) VALUES ('write_test', ?)", (value,))
        except OSError as error:
            return f"cannot use the ledger {self.path}: {error.strerror}"
        except LedgerError as error:
            return str(error)
        return ""

    def _in_place(self) -> None:
        """SQLite would go on writing into a file that was deleted."""
        try:
            found = _identity(self.path)
        except OSError as error:
            raise LedgerError(
                f"the ledger {self.path} is gone: {error.strerror}; put it back and restart the "
                "worker"
            ) from error
        if found != self._opened:
            raise LedgerError(
                f"the ledger {self.path} was replaced by another file; restart the worker"
            )


def hold(folder: Path) -> int:
    """Make the folder if need be, for its owner only, and lock it; the lock's file descriptor.

    Raises LedgerError if that is not possible, or another process has it locked.
    """
    try:
        new = not folder.exists()
        workspace.make_private(folder)
        if new:
            folder.chmod(0o700)  # whatever the umask took
        lock = workspace.try_lock(folder)
    except OSError as error:
        raise LedgerError(
            f"cannot use the work directory {folder}: {error.strerror}; make it writable or "
            "choose another with WORK_DIR (--work-dir)"
        ) from error
    if lock is None:
        raise LedgerError(
            f"another worker uses the work directory {folder}; stop it, or give this one "
            "a WORK_DIR, NODE_NAME and METRICS_PORT of its own"
        )
    return lock


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
