"""The ledger's file: its tables, how it is made, checked, and brought up to date."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Sequence
from pathlib import Path

from worker.errors import LedgerError

APPLICATION_ID = 0x66666D77
"""Marks the file as ours (``ffmw``; pragma application_id)."""

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE entry (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        retry INTEGER NOT NULL,
        created_us INTEGER,
        boot_id TEXT NOT NULL,
        accepted_at REAL NOT NULL,
        started_at REAL,
        finished_at REAL,
        settled_at REAL,
        reaped_at REAL,
        settled TEXT NOT NULL DEFAULT '' CHECK (settled IN ('', 'delivered', 'dropped')),
        why TEXT NOT NULL DEFAULT '',
        job TEXT NOT NULL,
        CHECK ((settled = '') = (settled_at IS NULL)),
        CHECK (settled <> 'delivered' OR finished_at IS NOT NULL),
        CHECK (reaped_at IS NULL OR settled_at IS NOT NULL)
    );
    CREATE INDEX entry_name ON entry (name);
    CREATE TABLE outcome (
        entry INTEGER PRIMARY KEY REFERENCES entry (id) ON DELETE CASCADE,
        evidence TEXT NOT NULL,
        result TEXT NOT NULL
    );
    CREATE TABLE step (
        entry INTEGER NOT NULL REFERENCES entry (id) ON DELETE CASCADE,
        step TEXT NOT NULL,
        unit TEXT NOT NULL,
        asked_at REAL NOT NULL,
        facts TEXT NOT NULL,
        PRIMARY KEY (entry, step)
    ) WITHOUT ROWID;
    CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    """,
)
"""Script N brings a ledger of version N to version N + 1; each runs in one transaction."""

PAGE_BYTES = 1024
"""A page that changes is written whole, and an entry is small: half the bytes of 4096."""
CHECKPOINT_PAGES = 1000
"""Pages of log that are gathered before they are copied into the main file."""

_LOST = "then the jobs it still owes a result for are lost to the master, which must time them out"


def connect(path: Path, migrations: Sequence[str] = MIGRATIONS) -> sqlite3.Connection:
    """Open the ledger at ``path``, made or brought up to date if need be.

    The caller holds the lock. Each statement is its own transaction unless it says otherwise.

    Raises LedgerError if the file is damaged, of a newer version, not ours, or not usable. It is
    left as it is then.
    """
    try:
        if not _exists(path):
            _make(path, migrations)
        # Read-only, or closing it would write the log into a file that is not trusted.
        db = _connection(path, "ro")
        try:
            _check(db, path, len(migrations))
        finally:
            db.close()
        db = _connection(path)
        try:
            _migrate(db, path, migrations)
            _tune(db)
        except BaseException:
            db.close()
            raise
    except OSError as error:
        raise LedgerError(
            f"cannot use the ledger {path}: {error.strerror}; make it and its folder writable or "
            "choose another folder with WORK_DIR (--work-dir)"
        ) from error
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise trouble(path, error) from error
    return db


def trouble(path: Path, error: sqlite3.Error | UnicodeDecodeError) -> LedgerError:
    """What an error of SQLite means for the ledger, and what to do.

    UnicodeDecodeError comes where SQLite's own message quotes a schema that is damaged.
    """
    if isinstance(error, UnicodeDecodeError):
        return damaged(path, "its schema cannot be read")
    # The low byte is the primary result code (sqlite.org/rescode.html).
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return damaged(path, str(error))
        case sqlite3.SQLITE_FULL:
            advice = "free space on its disk"
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            advice = "make the file and its folder writable"
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            advice = "end the program that holds it (fuser shows it)"
        case sqlite3.SQLITE_IOERR:
            advice = "free space on its disk, and see what the kernel says of it (journalctl -k)"
        case _:
            advice = "restart the worker"
    return LedgerError(f"cannot use the ledger {path}: {error}; {advice}")


def damaged(path: Path, what: str) -> LedgerError:
    """The error of a ledger whose content cannot be trusted."""
    return LedgerError(
        f"the ledger {path} is damaged: {what}; stop the worker and put back a good copy of the "
        f"file, or move it away together with its -wal and -shm: {_LOST}"
    )


def _exists(path: Path) -> bool:
    """Whether there is a ledger. What cannot be one raises OSError or LedgerError."""
    log = path.with_name(f"{path.name}-wal")
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if log.exists() and log.stat().st_size:
            raise damaged(path, "the file is missing, but its log is there") from None
        return False
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise damaged(path, "it is not a regular file")
        # SQLite would take an empty file for a new database and delete the log beside it.
        if found.st_size == 0:
            raise damaged(path, "the file is empty")
        os.fchmod(fd, 0o600)
    finally:
        os.close(fd)
    return True


def _make(path: Path, migrations: Sequence[str]) -> None:
    """Write a new ledger, whole or not at all: until the rename there is none."""
    new = path.with_name(f"{path.name}.new")
    for left in (new, new.with_name(f"{new.name}-journal")):
        left.unlink(missing_ok=True)
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
    finally:
        os.close(fd)
    db = _connection(new)
    try:
        db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        _migrate(db, new, migrations)
    finally:
        db.close()
    new.rename(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _connection(path: Path, mode: str = "rw") -> sqlite3.Connection:
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=5.0, isolation_level=None,
        check_same_thread=False,
    )  # fmt: skip
    db.execute("PRAGMA synchronous = FULL")
    return db


def _check(db: sqlite3.Connection, path: Path, known: int) -> None:
    """Raise LedgerError unless the file is a sound ledger of a known version."""
    [[owner]] = db.execute("PRAGMA application_id")
    if owner != APPLICATION_ID:
        raise damaged(path, "it is a database of another program")
    found = "\n".join(row for [row] in db.execute("PRAGMA quick_check(3)"))
    problems = [line for line in found.split("\n") if line != "ok" and line[:3] != "***"]
    if problems:
        raise damaged(path, "; ".join(problems))
    if db.execute("PRAGMA foreign_key_check").fetchone():
        raise damaged(path, "parts of it belong to entries that are not there")
    [[version]] = db.execute("PRAGMA user_version")
    if version > known:
        raise LedgerError(
            f"the ledger {path} is of version {version}, and this worker knows versions up to "
            f"{known}; install the newer worker again, or move the file away: {_LOST}"
        )


def _migrate(db: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    [[version]] = db.execute("PRAGMA user_version")
    # Foreign keys are off here, as a script that builds a table anew needs it (sqlite.org,
    # ALTER TABLE, "Making Other Kinds Of Table Schema Changes").
    for target, script in enumerate(migrations[version:], version + 1):
        try:
            db.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {target}; COMMIT;")
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")


def _tune(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    db.execute("PRAGMA foreign_keys = ON")
    # Deleted content is zeroed where that costs no extra write.
    db.execute("PRAGMA secure_delete = FAST")
