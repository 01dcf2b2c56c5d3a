"""The watchdog: systemd hears that we are alive only while every loop that matters is.

A process whose event loop is blocked sends nothing by nature. A loop that waits for ever on
something that never comes is harder to see: the process lives, answers /health, and does no work.
So each such loop promises when it will show up next, and a broken promise keeps the watchdog
unfed: systemd then ends the agent (``WatchdogSec=``, systemd.service(5)) and starts it anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from worker.master.retry import Throttle
from worker.telemetry.notify import Notifier

logger = logging.getLogger(__name__)

_SECOND_LOOK = 0.1
"""Part of the watchdog's time between two looks while a loop is stuck.

After a freeze of the whole process (SIGSTOP, a paused machine) all promises are broken at once,
and the loops keep them again within moments: the watchdog is then fed as soon as they do.
"""


class Pulse:
    """What the loops have promised. To be used from the event loop's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock``: seconds that no change of the date touches (CLOCK_MONOTONIC)."""
        self._clock = clock
        self._due: dict[str, float] = {}

    def beat(self, name: str, within: float) -> None:
        """Loop ``name`` is alive, and will beat or park again in less than ``within`` seconds.

        That is the longest time a healthy round may take, its pause and its time limits included.
        """
        self._due[name] = self._clock() + within

    def parked(self, name: str) -> None:
        """Loop ``name`` has ended, or waits on purpose for as long as it takes."""
        self._due.pop(name, None)

    def overdue(self) -> dict[str, float]:
        """The loops that broke their promise, and for how many seconds; the longest first."""
        now = self._clock()
        late = {name: now - due for name, due in self._due.items() if due < now}
        return dict(sorted(late.items(), key=lambda item: -item[1]))

    def stuck(self) -> list[str]:
        """Names of the loops that broke their promise; the one that did so first comes first."""
        return list(self.overdue())


async def feed(
    pulse: Pulse,
    notifier: Notifier,
    *,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Feed systemd's watchdog while no loop is stuck, until cancelled.

    Returns at once if systemd wants no watchdog.
    """
    seconds = notifier.watchdog_seconds
    if seconds is None:
        return
    complaint = Throttle()
    withheld = False
    while True:
        overdue = pulse.overdue()
        if overdue:
            withheld = True
            if complaint.due():
                loops = ", ".join(f"{name} ({late:.1f} s late)" for name, late in overdue.items())
                logger.error(
                    "stuck: %s; the watchdog is not fed, and systemd restarts the worker after "
                    "%g s without", loops, seconds,
                )  # fmt: skip
            await sleep(seconds * _SECOND_LOOK)
            continue
        if withheld:
            withheld = False
            complaint.reset()
            logger.info("no loop is stuck any more; the watchdog is fed again")
        notifier.watchdog()
        await sleep(seconds / 2)
