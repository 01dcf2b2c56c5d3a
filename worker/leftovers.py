"""What must outlive the agent: which jobs it accepted, and what became of them.

A job is on record from its acceptance until its report has arrived. So whatever is on record
when the agent starts was accepted, perhaps started, and perhaps not reported. It is never
started again under the same acceptance: its result is delivered where there is one, else it is
reported as failed, and the master decides.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from worker import workspace
from worker.errors import SystemdError, WorkerError
from worker.master.wire import Job, JobResult
from worker.systemd.launcher import Launcher
from worker.systemd.names import UNIT_PREFIX, Step, safe_id, unit_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """A job on record. ``result`` is None if it did not end before the agent did."""

    job: Job
    result: JobResult | None


class Records:
    """One small file a job in ``<work-dir>/accepted``, which one agent holds at a time.

    The files are written whole or not at all, but not forced onto the disk: they are for the
    death of the agent. When the machine dies, so do the jobs' units.
    """

    def __init__(self, work_dir: Path) -> None:
        """Raises WorkerError if the folder cannot be made, or another agent holds it."""
        self._folder = work_dir / "accepted"
        with workspace.using(work_dir):
            workspace.make_private(self._folder)
            self._lock = workspace.try_lock(self._folder)
        if self._lock is None:
            raise WorkerError(
                f"another worker uses the work directory {work_dir}; stop it, or give this one "
                "a WORK_DIR, NODE_NAME and METRICS_PORT of its own"
            )

    def close(self) -> None:
        """Let another agent have the folder; may be repeated."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def accepted(self, job: Job) -> None:
        """The job was taken, for the first time or anew."""
        self._write(job, {"job": _dump(job)})

    def ended(self, job: Job, result: JobResult) -> None:
        """The job has its result, and delivery begins."""
        self._write(job, {"job": _dump(job), "result": _dump(result)})

    def settled(self, job: Job) -> None:
        """The report has arrived or is not wanted: the job is off the record."""
        try:
            self._path(job).unlink(missing_ok=True)
        except OSError as error:
            logger.error("%s cannot be removed: %s", self._path(job), error.strerror)

    def left(self) -> list[Acceptance]:
        """All that is on record. Files that cannot be read are named in the log and removed."""
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                data = json.loads(path.read_bytes())
                result = data.get("result")
                found.append(
                    Acceptance(
                        Job.model_validate(data["job"]),
                        JobResult.model_validate(result) if result else None,
                    )
                )
            except (OSError, ValueError, KeyError, AttributeError, ValidationError) as error:
                logger.error("the record %s is unreadable and is dropped: %s", path.name, error)
                path.unlink(missing_ok=True)
        return found

    def _path(self, job: Job) -> Path:
        return self._folder / f"{safe_id(job.id)}.json"

    def _write(self, job: Job, data: dict[str, Any]) -> None:
        path = self._path(job)
        part = path.with_suffix(".part")
        try:
            part.write_text(json.dumps(data), encoding="ascii")
            part.replace(path)
        except OSError as error:
            logger.error(
                "job %s cannot be put on record (%s: %s); should the worker die now, the master "
                "learns of it from its own list only", job.id, path, error.strerror,
            )  # fmt: skip


class Remains:
    """The job folders and units that no process is responsible for any more."""

    def __init__(self, work_dir: Path, launcher: Launcher, jobs: list[Job]) -> None:
        """``jobs`` are those on record."""
        self._launcher = launcher
        self._folders = {path.name: path for path in workspace.abandoned(work_dir / "jobs")}
        self._names = {*self._folders, *(safe_id(job.id) for job in jobs)}
        self._foreign: frozenset[str] = frozenset()

    async def clear(self) -> None:
        """End the units of these jobs, all at once, and remove the folders.

        Units of others are named in the log and left alone.
        """
        if self._folders:
            logger.warning("left over from an earlier run: %s", ", ".join(sorted(self._folders)))
        loaded = set(await self._launcher.leftovers())
        ours = {
            f"{UNIT_PREFIX}{name}{step.suffix}.service" for name in self._names for step in Step
        }
        await asyncio.gather(*(self._end(unit) for unit in sorted(loaded & ours)))
        for path in self._folders.values():
            workspace.remove_tree(path)
        self._foreign = frozenset(loaded - ours)
        if self._foreign:
            logger.warning("units that are not ours to touch: %s", ", ".join(sorted(self._foreign)))

    def run_by_others(self, job_id: str) -> bool:
        """Whether somebody else on this machine ran the job when we started."""
        return any(unit_name(job_id, step) in self._foreign for step in Step)

    async def _end(self, unit: str) -> None:
        try:
            await self._launcher.stop_and_reap(unit)
        except SystemdError as error:
            logger.error("cannot end %s: %s", unit, error)


def _dump(model: Job | JobResult) -> dict[str, Any]:
    """As JSON can hold it; what it cannot (a time, say) as text."""
    dumped: dict[str, Any] = json.loads(json.dumps(dict(model), default=str))
    return dumped
