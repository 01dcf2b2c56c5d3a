"""Follows one unit to its end, and looks at it now and then meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from worker import workspace
from worker.systemd.launcher import Launcher
from worker.systemd.overrides import Changes, Overrides, described
from worker.systemd.state import UnitState
from worker.systemd.unit import Unit

logger = logging.getLogger(__name__)

SAMPLE_SECONDS = 1.0
SLOW_SAMPLE_SECONDS = 5.0
"""Between two looks at a job that has run for a minute. The counters only grow, so nothing is
missed; only the progress that is told is some seconds old."""
YOUNG_SECONDS = 60.0
LOOKS_PER_SECOND = 10
"""At all jobs together, as with a hundred on a node each look counts."""
MOST_SAMPLE_SECONDS = 10.0
"""Between two looks at a job, however many there are."""
PROGRESS_BYTES = 1024
"""Enough for the last blocks of ffmpeg's progress, which have some 250 bytes each."""


class Left(Exception):
    """The job is left to the next agent, its unit running or not."""


class Following:
    """One unit on its way. ``on_output`` gets the end of its standard output, now and then."""

    def __init__(
        self, launcher: Launcher, unit: Unit, on_output: Callable[[str], None], left: asyncio.Event
    ) -> None:
        self.changes: Changes = {}
        """Limits that somebody else has changed, as far as it is known."""
        self._launcher = launcher
        self._unit = unit
        self._on_output = on_output
        self._left = left
        self._overrides = Overrides(launcher, unit, user=launcher.user)

    async def end(self) -> UnitState:
        """Wait for the unit's end. Raises Left if it is to be left before."""
        ended = asyncio.create_task(self._unit.finished())
        left = asyncio.create_task(self._left.wait())
        begun = time.monotonic()
        try:
            while True:
                self._unit.sample()
                running = self._launcher.tracker.unfinished
                pause = look_pause(time.monotonic() - begun, running)
                await asyncio.wait({ended, left}, timeout=pause, return_when="FIRST_COMPLETED")
                await self._look_for_changes()
                if ended.done():
                    return ended.result()
                if left.done():
                    raise Left
                self._on_output(workspace.read_tail(self._unit.launch.stdout, PROGRESS_BYTES))
        finally:
            ended.cancel()
            left.cancel()

    async def _look_for_changes(self) -> None:
        if not self._overrides.noticed():
            return
        changes = await self._overrides.read()
        if changes != self.changes:
            self.changes = changes
            logger.warning(
                "%s: its limits were changed by somebody else: %s",
                self._unit.name, described(changes) or "they are as they were at the start again",
            )  # fmt: skip


def look_pause(age: float, running: int) -> float:
    """Seconds until the next look at a job of that age in seconds, one of so many that run."""
    least = SAMPLE_SECONDS if age < YOUNG_SECONDS else SLOW_SAMPLE_SECONDS
    return min(MOST_SAMPLE_SECONDS, max(least, running / LOOKS_PER_SECOND))
