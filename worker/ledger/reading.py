"""Entries, read from the ledger's tables."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from worker.ledger.entry import Entry, StepRecord, microseconds, state_of
from worker.master.wire import Job, JobResult
from worker.systemd.names import safe_id

_SELECT = (
    "SELECT id, job, boot_id, settled, why, evidence, result, accepted_at, started_at, "
    "finished_at, settled_at, reaped_at FROM entry LEFT JOIN outcome ON entry = id "
)


class Unreadable(Exception):
    """What is in the ledger is not what was put there. Says where."""


def key(job: Job) -> tuple[str, int, int | None]:
    """What tells one acceptance from another: name, retry count, time of creation."""
    return safe_id(job.id), job.retry_count, microseconds(job.created_at)


def newest(db: sqlite3.Connection, job: Job) -> Entry | None:
    """The newest entry of an acceptance."""
    found = entries(
        db, "WHERE name = ? AND retry = ? AND created_us IS ? ORDER BY id DESC LIMIT 1", *key(job)
    )
    return found[0] if found else None


def entry(db: sqlite3.Connection, entry_id: int) -> Entry:
    """One entry. Raises ValueError if there is none of that id."""
    found = entries(db, "WHERE id = ?", entry_id)
    if not found:
        raise ValueError(f"the ledger has no entry {entry_id}")
    return found[0]


def entries(db: sqlite3.Connection, which: str, *values: object) -> list[Entry]:
    """The entries that an SQL clause selects. Raises Unreadable."""
    rows = db.execute(_SELECT + which, values).fetchall()
    found = []
    for row in rows:
        try:
            found.append(_entry(row, _steps(db, row[0])))
        # pydantic's ValidationError is a ValueError, too.
        except (ValueError, TypeError, AttributeError) as error:
            raise Unreadable(f"entry {row[0]} cannot be read: {error}") from error
    return found


def text(value: str) -> str:
    """A value as ``to_json`` wrote it. Raises Unreadable."""
    try:
        read = json.loads(value)
    except (ValueError, TypeError) as error:
        raise Unreadable(f"a value cannot be read: {error}") from error
    if not isinstance(read, str):
        raise Unreadable("a value is not a text")
    return read


def _steps(db: sqlite3.Connection, entry_id: int) -> dict[str, StepRecord]:
    rows = db.execute(
        "SELECT step, unit, asked_at, facts FROM step WHERE entry = ? ORDER BY asked_at",
        (entry_id,),
    )
    return {
        step: StepRecord(step, unit, asked_at, json.loads(facts))
        for step, unit, asked_at, facts in rows
    }


def _entry(row: tuple[Any, ...], steps: dict[str, StepRecord]) -> Entry:
    entry_id, job, boot_id, settled, why, evidence, result, *times = row
    accepted_at, started_at, finished_at, settled_at, reaped_at = times
    return Entry(
        id=entry_id,
        job=Job.model_validate(json.loads(job)),
        state=state_of(started_at, finished_at, settled_at, reaped_at),
        boot_id=boot_id,
        result=None if result is None else JobResult.model_validate(json.loads(result)),
        steps=steps,
        settled=settled,
        why=why,
        evidence={} if evidence is None else json.loads(evidence),
        accepted_at=accepted_at,
        started_at=started_at,
        finished_at=finished_at,
        settled_at=settled_at,
        reaped_at=reaped_at,
    )
