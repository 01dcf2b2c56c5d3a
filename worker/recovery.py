"""What an agent finds when it starts: jobs of its predecessor, their units and their folders.

The ledger says what was accepted and how far it came, systemd says what is still there. Each
entry goes one of four ways; units and folders that no entry knows are nobody's business here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from worker import workspace
from worker.acceptance import Acceptance, boot_id
from worker.errors import SystemdError
from worker.ledger import Entry, Ledger, State
from worker.systemd.launcher import Launcher
from worker.systemd.names import UNIT_PREFIX, Step, safe_id, unit_name

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Found:
    """The entries of an earlier agent, by what is to be done with them."""

    begun: list[Entry] = field(default_factory=list)
    """ffmpeg runs, or did: to be followed and judged."""
    unstarted: list[Entry] = field(default_factory=list)
    """ffmpeg never ran: to be started, if the job is still ours."""
    owed: list[Entry] = field(default_factory=list)
    """The result is known: to be reported."""
    settled: list[Entry] = field(default_factory=list)
    """Nothing is owed: what is left of them goes."""
    foreign: list[str] = field(default_factory=list)
    """Units of jobs that are not on record."""
    loaded: Collection[str] = ()
    """All units of jobs that systemd has."""


def sort_out(entries: Iterable[Entry], loaded: Collection[str], work_dir: Path) -> Found:
    """Decide by what is on record, and by which units (``loaded``) and files are there."""
    found = Found(loaded=loaded)
    known: set[str] = set()
    for entry in entries:
        known.update(unit_name(entry.job.id, step) for step in Step)
        if entry.state is State.SETTLED:
            found.settled.append(entry)
        elif entry.state is State.FINISHED:
            found.owed.append(entry)
        elif never_ran(entry, loaded, work_dir):
            found.unstarted.append(entry)
        else:
            found.begun.append(entry)
    found.foreign = sorted(set(loaded) - known)
    return found


def never_ran(entry: Entry, loaded: Collection[str], work_dir: Path) -> bool:
    """Whether no unit of the job has executed its program, for sure."""
    if entry.state is State.ACCEPTED:
        return True
    if len(entry.steps) != 1:
        return False  # the second one is noted when the first has ended; none: it is not known
    ((name, step),) = entry.steps.items()
    # systemd makes the file for standard output before it executes the program. After a crash
    # of the machine the file may be missing all the same.
    output = work_dir / "jobs" / safe_id(entry.job.id) / f"{name}.out"
    same_boot = step.facts.get("boot_id") == boot_id()
    return same_boot and step.unit not in loaded and not output.exists()


class Recovery:
    """Puts away what is settled, and leaves the rest to the caller."""

    def __init__(self, ledger: Ledger, launcher: Launcher, work_dir: Path) -> None:
        self._ledger = ledger
        self._launcher = launcher
        self._work_dir = work_dir
        self._foreign: frozenset[str] = frozenset()

    async def look(self) -> Found:
        """Sort out what is there. Raises SystemdError, LedgerError."""
        entries = await self._ledger.run(self._ledger.unreaped)
        newest = {entry.job.id: entry for entry in entries}
        for entry in newest.values():
            await self._ledger.run(self._ledger.supersede, entry.id)
        loaded = await self._launcher.leftovers()
        found = sort_out(newest.values(), loaded, self._work_dir)
        self._launcher.sweep(loaded)
        self._foreign = frozenset(found.foreign)
        if found.foreign:
            logger.warning(
                "units of jobs that are not on record, left alone: %s", ", ".join(found.foreign)
            )
        names = {safe_id(entry.job.id) for entry in entries}
        for folder in workspace.abandoned(self._work_dir / "jobs"):
            units = {f"{UNIT_PREFIX}{folder.name}{step.suffix}.service" for step in Step}
            if folder.name not in names and not units & self._foreign:
                logger.warning("removing %s: no job on record has to do with it", folder)
                await asyncio.to_thread(workspace.remove_tree, folder)
        return found

    def run_by_others(self, job_id: str) -> bool:
        """Whether somebody else on this machine ran the job when we started."""
        return any(unit_name(job_id, step) in self._foreign for step in Step)

    async def put_away(self, entries: Iterable[Entry]) -> None:
        """Clear away the units and folders of entries; those that are settled are done then."""
        await asyncio.gather(*(self._put_away(entry) for entry in entries))

    async def _put_away(self, entry: Entry) -> None:
        try:
            for step in Step:
                await self._launcher.stop_and_reap(unit_name(entry.job.id, step))
        except SystemdError as error:
            logger.error("job %s: a unit is left over: %s", entry.job.id, error)
        folder = self._work_dir / "jobs" / safe_id(entry.job.id)
        await asyncio.to_thread(workspace.remove_tree, folder)
        if entry.state is State.SETTLED:
            await Acceptance(self._ledger, entry).close(entry.settled, entry.why)
