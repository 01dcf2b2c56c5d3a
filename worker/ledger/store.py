"""The ledger: one entry for each acceptance, kept until everything about the job is settled.

Each method is one transaction, which is on the disk when the method returns. The order of the
calls is the promise: ``starting`` comes back before the unit is asked for, so that after any
crash a unit that may have run is on record, and is not started a second time; ``finish`` comes
back before the unit and its files may go, so that a result is never lost.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

from worker.ledger import reading, records, schema
from worker.ledger.entry import (
    Entry,
    State,
    brief_json,
    evidence_json,
    job_json,
    result_json,
    sentence,
    to_json,
)
from worker.ledger.file import File
from worker.master.wire import Job, JobResult

P = ParamSpec("P")
R = TypeVar("R")


class Ledger:
    """Use :meth:`open`; :meth:`close` ends it. One process at a time holds a ledger.

    Every method raises LedgerError when the file cannot be read or written. Nothing of what it
    was to do is in the ledger then, and it can be called again. ValueError means that the order
    of the steps was not kept.
    """

    def __init__(self, file: File, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        migrations: Sequence[str] = schema.MIGRATIONS,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Open the ledger, made if there is none, and hold it. Its folder is locked (flock(2)).

        Raises LedgerError with what to do if another worker holds it, or it is damaged, of a
        newer version or not usable. Nothing is ever deleted to make it usable.
        """
        file = File(path, migrations)
        try:
            ledger = cls(file, clock)
            ledger.unreaped()  # whatever is owed must be readable
        except BaseException:
            file.close()
            raise
        return ledger

    def close(self) -> None:
        """Finish what is under way, and let go of the ledger; may be repeated."""
        self._thread.shutdown(wait=True)
        self._file.close()

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a method of this ledger in the ledger's own thread.

        The calls are done one after the other in the order in which they were made. One that
        was made is done even if the task that waits for it is cancelled.
        """
        call = self._thread.submit(function, *args, **kwargs)
        return await asyncio.shield(asyncio.wrap_future(call))

    def accept(self, job: Job) -> Entry:
        """Put an acceptance on record.

        If it is on record already and not settled, that entry is returned as it is: its state
        says how far it has come.
        """
        with self._file.writing() as db:
            found = reading.newest(db, job)
            if found is not None and not found.settled:
                return found
            return reading.entry(db, self._insert(db, job, self._clock()))

    def find(self, job: Job) -> Entry | None:
        """The newest entry of the same acceptance (id, retry count, time of creation), in any
        state; None if there is none."""
        with self._file.reading() as db:
            return reading.newest(db, job)

    def reissue(self, entry_id: int, job: Job) -> Entry:
        """Let an entry that is not settled answer for a newer acceptance of the same job.

        Its steps and its result stay: what was started is not started again.
        """
        with self._file.writing() as db:
            entry = self._unsettled(db, entry_id)
            if entry.job.id != job.id:
                raise ValueError(f"entry {entry_id} is of job {entry.job.id!r}, not {job.id!r}")
            db.execute(
                "UPDATE entry SET retry = ?, created_us = ?, job = ? WHERE id = ?",
                (*reading.key(job)[1:], job_json(job), entry_id),
            )
            return reading.entry(db, entry_id)

    def supersede(self, entry_id: int) -> int:
        """Drop what is open of older acceptances of the same job; how many that were.

        Their unit and folder are this entry's now, and the master has moved on.
        """
        with self._file.reading() as db:
            older = db.execute(
                "SELECT id FROM entry WHERE name = (SELECT name FROM entry WHERE id = ?) "
                "AND id < ? AND reaped_at IS NULL",
                (entry_id, entry_id),
            ).fetchall()
        if older:
            now = self._clock()
            with self._file.writing() as db:
                db.executemany(
                    "UPDATE entry SET settled_at = coalesce(settled_at, ?), reaped_at = ?, "
                    "settled = iif(settled = '', 'dropped', settled), "
                    "why = iif(settled = '', 'the job was handed out anew', why) WHERE id = ?",
                    [(now, now, number) for [number] in older],
                )
        return len(older)

    def starting(self, entry_id: int, step: str, unit: str, facts: Mapping[str, Any]) -> None:
        """The unit of a step is about to be started: once for each step of an acceptance.

        ``facts`` is what can be put into JSON; it comes back as the step's ``facts``.
        """
        with self._file.writing() as db:
            entry = self._unsettled(db, entry_id)
            if entry.state is State.FINISHED or step in entry.steps:
                raise ValueError(
                    f"step {step} of job {entry.job.id!r} must not be started: "
                    f"{'it was before' if step in entry.steps else 'the job has its result'}"
                )
            now = self._clock()
            db.execute(
                "INSERT INTO step (entry, step, unit, asked_at, facts) VALUES (?, ?, ?, ?, ?)",
                (entry_id, step, unit, now, to_json(dict(facts))),
            )
            # Rewritten for the first unit only: each page that changes is written whole.
            if entry.started_at is None or entry.boot_id != self._boot_id:
                db.execute(
                    "UPDATE entry SET started_at = coalesce(started_at, ?), boot_id = ? "
                    "WHERE id = ?",
                    (now, self._boot_id, entry_id),
                )

    def finish(self, entry_id: int, result: JobResult, evidence: Mapping[str, Any]) -> None:
        """The job has its result, started or not; a later call replaces it."""
        with self._file.writing() as db:
            self._unsettled(db, entry_id)
            self._finish(db, entry_id, result, evidence, self._clock())

    def settle(self, entry_id: int, how: str, why: str = "", *, reaped: bool = False) -> None:
        """The result is ``delivered``, or ``dropped`` for a reason; may be repeated.

        What was dropped need not have a result. The result's logs are not kept any longer.
        ``reaped`` does what reap() does in the same transaction.
        """
        if how not in ("delivered", "dropped") or (how == "dropped" and not why):
            raise ValueError(f"settled how and why? {how!r}, {why!r}")
        with self._file.writing() as db:
            entry = reading.entry(db, entry_id)
            if entry.settled != how:
                self._require_unsettled(entry)
                self._settle(db, entry, how, sentence(why))
            if reaped:
                self._reap(db, entry)

    def reap(self, entry_id: int) -> None:
        """All that is local of a settled job is gone; may be repeated."""
        with self._file.writing() as db:
            entry = reading.entry(db, entry_id)
            if not entry.settled:
                raise ValueError(f"job {entry.job.id!r} is {entry.state}, not settled")
            self._reap(db, entry)

    def unreaped(self) -> list[Entry]:
        """What is not done with, oldest first."""
        with self._file.reading() as db:
            return reading.entries(db, "WHERE reaped_at IS NULL ORDER BY entry.id")

    def recent(self, limit: int) -> list[Entry]:
        """The newest entries in any state, newest first."""
        with self._file.reading() as db:
            return reading.entries(db, "ORDER BY entry.id DESC LIMIT ?", limit)

    def prune(self, days: float, most: int) -> int:
        """Forget reaped entries older than ``days``, and the oldest beyond ``most`` of them.

        Returns how many that were.
        """
        with self._file.writing() as db:
            return db.execute(
                "DELETE FROM entry WHERE reaped_at < ? OR id IN (SELECT id FROM entry "
                "WHERE reaped_at IS NOT NULL ORDER BY id DESC LIMIT -1 OFFSET ?)",
                (self._clock() - days * 86400, max(0, most)),
            ).rowcount

    def get(self, name: str) -> str | None:
        """A value that was put, None if there is none."""
        with self._file.reading() as db:
            row = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
            return None if row is None else reading.text(row[0])

    def put(self, name: str, value: str) -> None:
        """Keep a value, any text, under a name. One that is there already costs no write."""
        if self.get(name) == value:
            return
        with self._file.writing() as db:
            db.execute("REPLACE INTO meta (name, value) VALUES (?, ?)", (name, to_json(value)))

    def check(self) -> str:
        """Why nothing can be written now, empty if it can be.

        Looks at the file and the free space, and tries a write only after one has failed: only
        then it may take long.
        """
        return self._file.trouble()

    def import_records(self, folder: Path) -> int:
        """Take over what a worker without a ledger left in ``<work-dir>/accepted``.

        A record with a result becomes a finished entry. One without becomes a started one, with
        both steps recorded: it does not say whether its units were started, and so they must
        not be. Returns how many entries were made.

        Raises LedgerError if a worker still holds the folder, or it cannot be read.
        """
        with records.held(folder) as found:
            made = 0
            with self._file.writing() as db:
                for record in found:
                    if reading.newest(db, record.job) is None:
                        made += 1
                        entry_id = self._insert(db, record.job, record.written_at)
                        if record.result is not None:
                            self._finish(db, entry_id, record.result, {}, record.written_at)
                        else:
                            records.mark_started(db, entry_id, record)
            records.remove(folder, found)
        return made

    def _insert(self, db: sqlite3.Connection, job: Job, at: float) -> int:
        row = db.execute(
            "INSERT INTO entry (name, retry, created_us, boot_id, accepted_at, job) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (*reading.key(job), self._boot_id, at, job_json(job)),
        ).lastrowid
        assert row is not None
        return row

    @staticmethod
    def _finish(
        db: sqlite3.Connection,
        entry_id: int,
        result: JobResult,
        evidence: Mapping[str, Any],
        at: float,
    ) -> None:
        db.execute("UPDATE entry SET finished_at = ? WHERE id = ?", (at, entry_id))
        db.execute(
            "REPLACE INTO outcome (entry, evidence, result) VALUES (?, ?, ?)",
            (entry_id, evidence_json(evidence), result_json(result)),
        )

    def _settle(self, db: sqlite3.Connection, entry: Entry, how: str, why: str) -> None:
        if how == "delivered" and entry.result is None:
            raise ValueError(f"job {entry.job.id!r} has no result that could be delivered")
        db.execute(
            "UPDATE entry SET settled_at = ?, settled = ?, why = ? WHERE id = ?",
            (self._clock(), how, why, entry.id),
        )
        if entry.result is not None and (entry.result.logs or entry.result.analyzer_output):
            db.execute(
                "UPDATE outcome SET result = ? WHERE entry = ?",
                (brief_json(entry.result), entry.id),
            )

    def _reap(self, db: sqlite3.Connection, entry: Entry) -> None:
        if entry.state is not State.REAPED:
            db.execute("UPDATE entry SET reaped_at = ? WHERE id = ?", (self._clock(), entry.id))

    @classmethod
    def _unsettled(cls, db: sqlite3.Connection, entry_id: int) -> Entry:
        entry = reading.entry(db, entry_id)
        cls._require_unsettled(entry)
        return entry

    @staticmethod
    def _require_unsettled(entry: Entry) -> None:
        if entry.settled:
            raise ValueError(f"job {entry.job.id!r} is {entry.settled} already")
