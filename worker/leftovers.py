"""What an earlier run of the agent left behind: it is stopped, and the master is told.

A job's folder exists from its acceptance until its report has arrived, so a folder that no
process holds means: accepted, perhaps started, and not reported. Such a job is never started
again here under the same acceptance; it is reported as failed and the master decides.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from worker import workspace
from worker.errors import MasterRefused, MasterUnreachable, SystemdError
from worker.master.client import NO_SUCH_ROUTE, MasterClient
from worker.master.retry import Backoff
from worker.master.session import HANDED_OUT
from worker.master.wire import Job
from worker.systemd.launcher import Launcher
from worker.systemd.names import UNIT_PREFIX, Step, safe_id

logger = logging.getLogger(__name__)


class Leftovers:
    """The job folders of an earlier run under ``jobs_dir``, and their units."""

    def __init__(self, jobs_dir: Path, launcher: Launcher) -> None:
        self._launcher = launcher
        self._folders = {path.name: path for path in workspace.abandoned(jobs_dir)}

    async def stop(self) -> None:
        """End every unit of these jobs. Units of others are named in the log and left alone."""
        for name in self._folders:
            logger.warning("job folder %s is left over from an earlier run", name)
            for step in Step:
                unit = f"{UNIT_PREFIX}{name}{step.suffix}.service"
                try:
                    await self._launcher.stop_and_reap(unit)
                except SystemdError as error:
                    logger.error("cannot end %s: %s", unit, error)
        foreign = await self._launcher.leftovers()
        if foreign:
            logger.warning("units that are not ours to touch: %s", ", ".join(foreign))

    async def jobs(self, client: MasterClient, node_id: str) -> list[Job]:
        """Those of these jobs that the master still holds for this node.

        Asks until it is answered: a job of unknown standing must not be taken for a new one.
        Folders of all other jobs are removed; those of the jobs returned when
        :meth:`forget` is called, which is when the master has been told.
        """
        if not self._folders:
            return []
        backoff = Backoff(1.0, 60.0)
        while True:
            try:
                jobs = await client.jobs()
                break
            except (MasterRefused, MasterUnreachable) as error:
                if isinstance(error, MasterRefused) and error.status in NO_SUCH_ROUTE:
                    jobs = []
                    break
                wait = backoff.next(error.retry_after)
                logger.warning(
                    "cannot ask what became of our jobs: %s; in %.0f s again", error, wait
                )
                await asyncio.sleep(wait)
        held = {
            safe_id(job.id): job
            for job in jobs
            if job.node_id == node_id and job.status in HANDED_OUT
        }
        for name in [name for name in self._folders if name not in held]:
            workspace.remove_tree(self._folders.pop(name))
        return [held[name] for name in self._folders]

    def forget(self, job: Job) -> None:
        """Remove a job's folder."""
        if path := self._folders.pop(safe_id(job.id), None):
            workspace.remove_tree(path)
