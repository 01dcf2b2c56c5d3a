"""What goes on beside the jobs: the status line, gauges, and the clearing away of old things."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from worker.config import Settings
from worker.dispatch import Dispatcher
from worker.errors import LedgerError, SystemdError
from worker.ledger import Ledger
from worker.master.retry import Throttle
from worker.node import disk
from worker.systemd.launcher import Launcher
from worker.systemd.scope import attachments
from worker.telemetry.metrics import Metrics
from worker.telemetry.notify import Notifier

logger = logging.getLogger(__name__)

DISK_WARN_RATIO = 0.90
DISK_FULL_RATIO = 0.95
STATUS_SECONDS = 5.0
"""The longest time between two looks at what the status line tells."""
STATUS_PAUSE_SECONDS = 1.0
"""The shortest: jobs may begin and end by the dozen, and each look costs half a millisecond."""
ATTACHMENTS_SECONDS = 15.0
"""Between two counts of what is attached; each costs systemd a walk over its units."""
HISTORY_SECONDS = 300.0
MOST_HISTORY = 10_000
"""Jobs that stay in the history at most, however young they are."""
WORK_FILES = ("input_*", "job_*_output.*")
"""What PERSIST_INPUTS and PERSIST_OUTPUTS leave in the work directory."""


class Upkeep:
    """Each coroutine runs until it is cancelled. ``readiness`` says why no jobs are taken."""

    def __init__(
        self,
        settings: Settings,
        notifier: Notifier,
        metrics: Metrics,
        launcher: Launcher,
        ledger: Ledger,
        readiness: Callable[[], list[str]],
    ) -> None:
        self._settings = settings
        self._notifier = notifier
        self._metrics = metrics
        self._launcher = launcher
        self._ledger = ledger
        self._readiness = readiness
        self._disk_complaint = Throttle(600.0)

    def unusable(self) -> list[str]:
        """Why no job can be put on record, or have its files in the work directory."""
        reasons = [self._ledger.check(), self._disk_unusable()]
        return [reason for reason in reasons if reason]

    async def status(self, dispatcher: Dispatcher) -> None:
        """Keep systemctl's status line, the disk gauge and the disk warning up to date."""
        last = ""
        while True:
            used = self._disk_used()
            if used is not None:
                self._metrics.set_disk_used(used)
            if used is not None and used >= DISK_WARN_RATIO and self._disk_complaint.due():
                logger.warning(
                    "the disk of %s is %.0f %% full; at %.0f %% no more jobs are taken",
                    self._settings.work_dir, used * 100, DISK_FULL_RATIO * 100,
                )  # fmt: skip
            reasons = self._readiness()
            line = f"{len(dispatcher.running)} of {dispatcher.slots} slots in use"
            if undelivered := len(dispatcher.reports):
                line += f", {undelivered} results not delivered"
            line = f"{line}; taking no jobs: {'; '.join(reasons)}" if reasons else f"ready, {line}"
            if line != last:
                self._notifier.status(line)
                last = line
            dispatcher.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STATUS_SECONDS):
                    await asyncio.sleep(STATUS_PAUSE_SECONDS)
                    await dispatcher.changed.wait()

    async def attached(self) -> None:
        """Keep the metrics of attached processes up to date."""
        while True:
            try:
                self._metrics.set_attached(await attachments(self._launcher.bus))
            except SystemdError as error:
                logger.debug("cannot count what is attached: %s", error)
            await asyncio.sleep(ATTACHMENTS_SECONDS)

    async def history(self) -> None:
        """Remove, every five minutes, what is older than HISTORY_DAYS."""
        days = self._settings.history_days
        while True:
            try:
                gone = await self._ledger.run(self._ledger.prune, days, MOST_HISTORY)
            except LedgerError as error:
                logger.error("old entries cannot be removed: %s", error)
            else:
                if gone:
                    logger.info("%d jobs older than %d days are off the record", gone, days)
            await asyncio.to_thread(remove_old_files, self._settings.work_dir, days)
            await asyncio.sleep(HISTORY_SECONDS)

    def _disk_unusable(self) -> str:
        """Why no job can have its files in the work directory; empty if they can."""
        folder = self._settings.work_dir
        try:
            used = disk.usage(folder).used_ratio
        except OSError as error:
            return f"the work directory {folder}: {error.strerror}"
        if used >= DISK_FULL_RATIO:
            return (
                f"the disk of {folder} is {used:.0%} full (limit {DISK_FULL_RATIO:.0%}); "
                "free some space"
            )
        if not os.access(folder / "jobs", os.W_OK | os.X_OK):
            return f"the work directory {folder / 'jobs'} is not writable"
        return ""

    def _disk_used(self) -> float | None:
        """0 to 1; None where the work directory cannot be looked at, which readiness tells."""
        try:
            return disk.usage(self._settings.work_dir).used_ratio
        except OSError:
            return None


def remove_old_files(work_dir: Path, days: int) -> None:
    """Delete kept inputs and outputs in the work directory that nobody wrote to for so long."""
    oldest = time.time() - days * 86400
    for pattern in WORK_FILES:
        for path in work_dir.glob(pattern):
            try:
                if not path.is_dir() and path.lstat().st_mtime < oldest:
                    path.unlink()
                    logger.info("removed %s, which is older than %d days", path, days)
            except FileNotFoundError:
                continue
            except OSError as error:
                logger.warning("cannot remove %s: %s", path, error.strerror)
