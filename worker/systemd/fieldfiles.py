"""Removes the files by which systemd tells journald a unit's extra fields (LogExtraFields=).

systemd writes one for each such unit to /run/systemd/units and (seen with 252, 2024) leaves it
there when the unit goes. Units with names used once would fill that tmpfs over months.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Container
from pathlib import Path

from worker.systemd.names import JOB_UNITS

logger = logging.getLogger(__name__)

FOLDER = Path("/run/systemd/units")
_PREFIX = "log-extra-fields:"
_DELAY_SEC = 5.0
"""journald may still be reading what the unit said last."""


class FieldFiles:
    """Files that are due to be removed, by the name of their unit."""

    def __init__(self, folder: Path = FOLDER, delay: float = _DELAY_SEC) -> None:
        self._folder = folder
        self._delay = delay
        self._due: dict[str, asyncio.TimerHandle] = {}

    def unit_gone(self, unit: str) -> None:
        """The unit is unloaded: its file goes in a while."""
        self.unit_wanted(unit)
        loop = asyncio.get_running_loop()
        self._due[unit] = loop.call_later(self._delay, self._remove, unit)

    def unit_wanted(self, unit: str) -> None:
        """A unit of that name is about to start, and will have a file of its own."""
        if timer := self._due.pop(unit, None):
            timer.cancel()

    def sweep(self, loaded: Container[str]) -> None:
        """See to the files of units of jobs that are not loaded: their agent was killed."""
        for path in self._folder.glob(f"{_PREFIX}{JOB_UNITS}"):
            unit = path.name.removeprefix(_PREFIX)
            if unit not in loaded:
                self.unit_gone(unit)

    def close(self) -> None:
        """Remove all that is due, now."""
        for unit, timer in list(self._due.items()):
            timer.cancel()
            self._remove(unit)

    def _remove(self, unit: str) -> None:
        self._due.pop(unit, None)
        try:
            (self._folder / f"{_PREFIX}{unit}").unlink(missing_ok=True)
        except OSError as error:
            # A user's manager, or a service without this folder in its ReadWritePaths=.
            logger.debug("%s of %s stays: %s", self._folder, unit, error.strerror)
