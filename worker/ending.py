"""How the agent stops: as the operator meant it, which systemd knows."""

from __future__ import annotations

import asyncio
import logging
import time

from worker.config import Settings
from worker.dispatch import Dispatcher
from worker.jobs.outcome import Intent
from worker.ledger import Ledger
from worker.master.session import DEAD_AFTER
from worker.systemd.bus import Bus
from worker.systemd.ownunit import StopReason, stop_reason
from worker.telemetry.notify import Notifier

logger = logging.getLogger(__name__)

LAST_POLL_SEC = 5.0
EXTENSION_SEC = 60.0
"""By so much the time for a stop is extended, again and again while it goes on."""
_SILENT_SINCE = "silent since"
_SILENCE_SEC = DEAD_AFTER + 10.0


class Ending:
    """``hurry`` is set by whoever is tired of waiting: first for jobs, then for reports."""

    def __init__(
        self,
        settings: Settings,
        notifier: Notifier,
        bus: Bus,
        dispatcher: Dispatcher,
        ledger: Ledger,
        hurry: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._notifier = notifier
        self._bus = bus
        self._dispatcher = dispatcher
        self._ledger = ledger
        self._hurry = hurry

    async def run(self, polling: asyncio.Task[None], *, told: bool, registered: bool) -> None:
        """End the polling, and then the jobs as STOP_MODE says, or leave them.

        ``told`` is false if something of ours has failed: systemd starts us again then, as
        after a restart.
        """
        extending = asyncio.create_task(self._extend())
        try:
            reason = await stop_reason(self._bus) if told else StopReason.RESTART
            self._notifier.stopping(f"stopping ({reason.value})")
            # A request for a job that is under way may still bring one, to be answered for.
            await asyncio.wait({polling}, timeout=LAST_POLL_SEC if registered else 0)
            polling.cancel()
            await asyncio.wait({polling}, timeout=1.0)
            await self._jobs(reason)
        finally:
            extending.cancel()

    async def _jobs(self, reason: StopReason) -> None:
        dispatcher, mode = self._dispatcher, self._settings.stop_mode
        shutdown = reason is StopReason.SHUTDOWN
        if reason is StopReason.RESTART or (mode == "leave" and not shutdown):
            logger.info("%d jobs run on; the next worker follows them", len(dispatcher.running))
            await dispatcher.leave()
            return
        if dispatcher.running and not shutdown:
            await self._see_jobs_end(None if mode == "drain" else self._settings.stop_grace)
        await dispatcher.stop(Intent.POWEROFF if shutdown else Intent.SHUTDOWN, self._hurry)
        if dispatcher.left_to_the_master:
            await self._ledger.run(self._ledger.put, _SILENT_SINCE, str(time.time()))

    async def _see_jobs_end(self, seconds: float | None) -> None:
        """Wait for the running jobs, for so long or for ever, unless told to hurry."""
        logger.info(
            "waiting for %d jobs to end%s", len(self._dispatcher.running),
            f", at most {seconds:g} s" if seconds is not None else "",
        )  # fmt: skip
        idle = asyncio.create_task(self._dispatcher.idle())
        hurried = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({idle, hurried}, timeout=seconds, return_when="FIRST_COMPLETED")
        for task in (idle, hurried):
            task.cancel()
        self._hurry.clear()  # the next signal is about the reports

    async def _extend(self) -> None:
        """Tell systemd that the stop makes progress, for as long as it takes."""
        while True:
            self._notifier.extend_timeout(EXTENSION_SEC)
            await asyncio.sleep(EXTENSION_SEC / 3)


def silence_left(ledger: Ledger) -> float:
    """Seconds for which the master must not hear of us, so that it gives jobs away.

    Those are the jobs that were stopped in their last retry, see ``worker.dispatch``.
    """
    since = float(ledger.get(_SILENT_SINCE) or 0.0)
    # At most the whole time: the clock may have been set back.
    return min(since + _SILENCE_SEC - time.time(), _SILENCE_SEC)


def end_silence(ledger: Ledger) -> None:
    ledger.put(_SILENT_SINCE, "")
