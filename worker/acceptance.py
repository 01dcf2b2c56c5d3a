"""One acceptance on record: what may be done for it next, and what has been done.

Every step is in the ledger, and on the disk, before the next one acts. So whatever dies, the
next agent knows of each job whether its ffmpeg may have been started, and what became of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from worker.errors import LedgerError
from worker.ledger import Entry, Ledger
from worker.master.wire import Job, JobResult
from worker.systemd.names import Step

logger = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class StepRecords(Protocol):
    """What is on record of the units of a job."""

    def recorded(self, step: Step) -> Mapping[str, Any] | None:
        """The facts noted at the start of a step's unit; None if it was never to be started."""

    async def starting(self, step: Step, unit: str, facts: Mapping[str, Any]) -> None:
        """A unit is about to be started. Raises LedgerError if that cannot be noted."""


class NoRecords:
    """For a job that ends with the process that runs it."""

    def recorded(self, step: Step) -> Mapping[str, Any] | None:
        return None

    async def starting(self, step: Step, unit: str, facts: Mapping[str, Any]) -> None:
        pass


class Acceptance:
    """An entry of the ledger, in the hands of whoever works on it."""

    def __init__(self, ledger: Ledger, entry: Entry) -> None:
        self.job = entry.job
        self.entry = entry
        self._ledger = ledger
        self.finished = entry.result is not None
        """The result is on record."""
        self._steps = {name: dict(step.facts) for name, step in entry.steps.items()}

    def __repr__(self) -> str:
        return f"<Acceptance {self.job.id!r} {self.entry.state}>"

    @property
    def accepted_at(self) -> float:
        """Unix time."""
        return self.entry.accepted_at

    def recorded(self, step: Step) -> Mapping[str, Any] | None:
        return self._steps.get(step.value)

    async def starting(self, step: Step, unit: str, facts: Mapping[str, Any]) -> None:
        facts = {"boot_id": boot_id(), **facts}
        await self._ledger.run(self._ledger.starting, self.entry.id, step.value, unit, facts)
        self._steps[step.value] = facts

    async def reissue(self, job: Job) -> None:
        """From now on this answers for ``job``, handed out anew. Raises LedgerError."""
        self.job = job
        self.entry = await self._ledger.run(self._ledger.reissue, self.entry.id, job)

    async def finish(self, result: JobResult, evidence: Mapping[str, Any]) -> bool:
        """Note the result. False, and an error in the log, if that is impossible now."""
        self.finished |= await self._note("result", self._ledger.finish, result, evidence)
        return self.finished

    async def close(self, how: str, why: str = "") -> bool:
        """Note that nothing is owed to the master any more, and nothing of the job is left here.

        ``how`` is ``delivered``, or ``dropped`` for a reason.
        """
        return await self._note("end", self._ledger.settle, how, why, reaped=True)

    async def _note(self, what: str, write: Any, *args: object, **options: object) -> bool:
        try:
            await self._ledger.run(write, self.entry.id, *args, **options)
        except LedgerError as error:
            logger.error("job %s: its %s is not on record: %s", self.job.id, what, error)
            return False
        except ValueError:  # a defect of ours, which must not cost the job its report
            logger.exception("job %s: its %s cannot be on record", self.job.id, what)
            return False
        return True


class Unrecorded(Acceptance):
    """An answer to the master of which nothing is to be noted (any more)."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.finished = True

    def __repr__(self) -> str:
        return f"<Unrecorded {self.job.id!r}>"

    async def finish(self, result: JobResult, evidence: Mapping[str, Any]) -> bool:
        return True

    async def close(self, how: str, why: str = "") -> bool:
        return True

    async def reissue(self, job: Job) -> None:
        self.job = job


def boot_id() -> str:
    """Names the running boot of this machine (random(4)); empty where it cannot be read."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""
