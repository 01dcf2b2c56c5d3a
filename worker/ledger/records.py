"""What a worker without a ledger left: one small file a job in ``<work-dir>/accepted``."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from worker import workspace
from worker.errors import LedgerError
from worker.ledger.entry import to_json
from worker.master.wire import Job, JobResult
from worker.systemd.names import Step, unit_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """A job that was accepted, and its result if it had one. ``written_at`` is in Unix time."""

    path: Path
    job: Job
    result: JobResult | None
    written_at: float


@contextlib.contextmanager
def held(folder: Path) -> Iterator[list[Record]]:
    """The records in the folder, which no other worker can use meanwhile; none if it is missing.

    A file that cannot be understood is named in the log and gets the ending ``.unreadable``.

    Raises LedgerError if another worker holds the folder, or it cannot be used.
    """
    try:
        lock = workspace.try_lock(folder)
    except FileNotFoundError:
        yield []
        return
    except OSError as error:
        raise _unusable(folder, error) from error
    if lock is None:
        raise LedgerError(f"another worker uses {folder}; stop it, and start this one again")
    try:
        try:
            found = [record for path in sorted(folder.glob("*.json")) if (record := _read(path))]
        except OSError as error:
            raise _unusable(folder, error) from error
        yield found
    finally:
        os.close(lock)


def mark_started(db: sqlite3.Connection, entry_id: int, record: Record) -> None:
    """Put both steps on record as if their units had been asked for: nobody can tell."""
    db.execute("UPDATE entry SET started_at = ? WHERE id = ?", (record.written_at, entry_id))
    for step in (Step.INPUT, Step.MAIN):
        db.execute(
            "INSERT INTO step (entry, step, unit, asked_at, facts) VALUES (?, ?, ?, ?, ?)",
            (
                entry_id, step.value, unit_name(record.job.id, step), record.written_at,
                to_json({"imported": True}),
            ),
        )  # fmt: skip


def remove(folder: Path, records: list[Record]) -> None:
    """Delete the files that were taken over, and the folder if nothing else is in it."""
    try:
        for record in records:
            record.path.unlink(missing_ok=True)
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        # Harmless: what is in the ledger is not taken over again.
        logger.warning("cannot remove %s: %s; remove it by hand", folder, error.strerror)


def _read(path: Path) -> Record | None:
    content = path.read_bytes()
    try:
        data = json.loads(content)
        result = data.get("result")
        return Record(
            path,
            Job.model_validate(data["job"]),
            JobResult.model_validate(result) if result else None,
            path.stat().st_mtime,
        )
    # pydantic's ValidationError is a ValueError, too.
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        aside = path.with_suffix(".unreadable")
        path.replace(aside)
        logger.error("the record %s is unreadable and is put aside: %s", aside, error)
        return None


def _unusable(folder: Path, error: OSError) -> LedgerError:
    return LedgerError(
        f"cannot take over the records in {folder}: {error.strerror}; make the folder usable, or "
        "move it away: then the jobs in it are lost to the master, which must time them out"
    )
