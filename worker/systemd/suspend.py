"""Pauses running units and has them go on, with the paused time not counted by their time limit.

Pausing is SIGSTOP to every process of the unit. The cgroup freezer would be neater, but systemd
has none on cgroup v1, and newer versions (257 for one) refuse to stop a unit that is frozen. A
stopped process, however, ends at once when its unit is told to: systemd sends SIGCONT after
SIGTERM (systemd.kill(5)).

systemd counts RuntimeMaxSec= from the start of the unit and does not let it be changed over D-Bus
while the unit runs. So a drop-in next to the transient unit's own file sets it to infinity during
a pause, and afterwards to the limit plus all time paused. The drop-in also keeps what the next
agent has to know. systemd itself removes it together with the unit, if it has read it: one written
without a reload stays, and would count for the next unit of that name. Hence forget().
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path

from worker.errors import NoSuchUnit, SystemdError
from worker.systemd.launcher import Launcher
from worker.systemd.names import JOB_UNITS, object_path
from worker.systemd.state import UNSET, counter
from worker.systemd.unit import Unit

logger = logging.getLogger(__name__)

SYSTEM_FOLDER = Path("/run/systemd/transient")
"""Where the system's manager keeps transient units, systemd.unit(5)."""
_FILE = "60-ffmpeg-worker-pause.conf"
_FORM = """\
# Made by ffmpeg-worker, which pauses this unit. Microseconds of CLOCK_MONOTONIC.
# limit={limit} paused={paused} since={since}
[Service]
RuntimeMaxSec={effective}
"""
_FACTS = re.compile(r"^# limit=(\d+) paused=(\d+) since=(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Pause:
    """What is known of a unit that is or was paused. Times in microseconds, CLOCK_MONOTONIC."""

    limit: int
    """RuntimeMaxUSec the unit was started with; systemd's UNSET if it has no limit."""
    paused: int = 0
    """How long it was paused, without a pause that goes on."""
    since: int = 0
    """When the pause began that goes on; 0 if there is none."""

    @property
    def effective(self) -> int:
        """What RuntimeMaxUSec has to be."""
        return UNSET if self.since or self.limit == UNSET else self.limit + self.paused

    def text(self) -> str:
        """The drop-in."""
        limit = "infinity" if self.effective == UNSET else f"{self.effective}us"
        return _FORM.format(limit=self.limit, paused=self.paused, since=self.since, effective=limit)

    @classmethod
    def parse(cls, text: str) -> Pause | None:
        """Read a drop-in; None if it is none of ours."""
        found = _FACTS.search(text)
        return cls(*(int(number) for number in found.groups())) if found else None

    def begun(self, now: int) -> Pause:
        """Paused from ``now`` on, if it is not already."""
        return self if self.since else replace(self, since=now)

    def ended(self, now: int) -> Pause:
        """Going on from ``now`` on, if it is paused."""
        return replace(self, paused=self.total(now), since=0)

    def total(self, now: int) -> int:
        """How long it was paused up to ``now``."""
        return self.paused + (max(0, now - self.since) if self.since else 0)


class Suspension:
    """Pauses and resumes units of a launcher, those of an earlier agent included.

    Every step may be repeated, and an agent that dies half way through one leaves a state from
    which either step leads on: after adoption call pause() or resume(), as is wanted. Call
    forget() after every reap(), and sweep() when the agent starts.
    """

    def __init__(self, launcher: Launcher, folder: Path | None = None, *, user: bool = False):
        """``user`` as for the launcher; ``folder`` where its manager keeps transient units."""
        if folder is None:
            runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
            folder = Path(runtime, "systemd/transient") if user else SYSTEM_FOLDER
        self._launcher = launcher
        self._folder = folder
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._reload_turn = asyncio.Lock()
        self._next_reload: asyncio.Task[None] | None = None
        self._reloads: set[asyncio.Task[None]] = set()

    def paused(self, unit: Unit) -> bool:
        """The unit was told to pause and has not been told to go on."""
        pause = self._read(unit.name)
        return pause is not None and pause.since > 0

    def paused_seconds(self, unit: Unit) -> float:
        """For how long the unit was paused, up to now or to its end. To be asked before reap()."""
        pause = self._read(unit.name)
        if pause is None:
            return 0.0
        return pause.total(unit.state.exec_main_exit_usec or _now()) / 1e6

    async def pause(self, unit: Unit) -> None:
        """Stop all processes of the unit where they are. Nothing for a unit that has ended.

        The order is given until systemd has taken it, however long the bus is away. Raises
        SystemdError if the drop-in cannot be written, and the unit runs on; or if systemd refuses
        to read it, and the unit is paused with its time limit running.
        """
        async with self._turns[unit.name]:
            if unit.state.finished:
                return
            pause = self._read(unit.name) or Pause(await self._limit(unit.name))
            if not pause.since:
                self._write(unit.name, pause := pause.begun(_now()))
            await self._signal(unit.name, signal.SIGSTOP)
            await self._apply(unit.name, pause)

    async def resume(self, unit: Unit) -> None:
        """Have the unit go on. Nothing for a unit that was never paused.

        As for pause(). Raises SystemdError if the time limit cannot be set again; the unit then
        goes on without one.
        """
        async with self._turns[unit.name]:
            pause = self._read(unit.name)
            if pause is None or unit.state.finished:
                return
            await self._signal(unit.name, signal.SIGCONT)
            if pause.since:
                # Only now: what comes in between is given to the unit, not taken from it.
                self._write(unit.name, pause := pause.ended(_now()))
            await self._apply(unit.name, pause)

    async def forget(self, unit: Unit) -> None:
        """Remove what systemd has left of a reaped unit's pauses; nothing there is fine."""
        async with self._turns[unit.name]:
            self._remove(unit.name)
        self._turns.pop(unit.name, None)

    def sweep(self, loaded: Container[str]) -> None:
        """Remove what is left of the pauses of units that are not among the loaded ones."""
        for folder in self._folder.glob(f"{JOB_UNITS}.d"):
            name = folder.name.removesuffix(".d")
            if name not in loaded:
                self._remove(name)

    async def _signal(self, name: str, number: signal.Signals) -> None:
        with contextlib.suppress(NoSuchUnit):  # its end is for those who follow it
            await self._launcher.repeat("KillUnit", "ssi", name, "all", int(number))

    async def _apply(self, name: str, pause: Pause) -> None:
        """Have systemd read the drop-in, unless it has."""
        if await self._limit(name) != pause.effective:
            await self._reload()

    async def _limit(self, name: str) -> int:
        """The time limit that holds now."""
        value = await self._launcher.read(object_path(name), "Service", "RuntimeMaxUSec")
        limit = counter(value)
        return UNSET if limit is None else limit

    async def _reload(self) -> None:
        """A daemon-reload that begins after this call; one for all who call meanwhile."""
        if self._next_reload is None:
            self._next_reload = asyncio.create_task(self._reload_once())
            self._reloads.add(self._next_reload)
            self._next_reload.add_done_callback(self._reloads.discard)
        await asyncio.shield(self._next_reload)

    async def _reload_once(self) -> None:
        async with self._reload_turn:
            self._next_reload = None  # it may miss what is written from here on
            await self._launcher.repeat("Reload", "")

    def _read(self, name: str) -> Pause | None:
        try:
            text = self._file(name).read_text("ascii", "replace")
        except OSError:
            return None
        return Pause.parse(text)

    def _write(self, name: str, pause: Pause) -> None:
        file = self._file(name)
        draft = file.with_suffix(".new")  # systemd reads *.conf only
        try:
            file.parent.mkdir(exist_ok=True)
            file.parent.chmod(0o755)
            draft.write_text(pause.text(), "ascii")
            draft.chmod(0o644)
            draft.replace(file)
        except OSError as error:
            raise SystemdError(
                f"cannot write {file} to hold back the time limit of {name}: {error.strerror}."
                f" Let the agent write below {self._folder} (ReadWritePaths= of its service)"
            ) from error

    def _remove(self, name: str) -> None:
        file = self._file(name)
        try:
            for path in (file, file.with_suffix(".new")):
                path.unlink(missing_ok=True)
            file.parent.rmdir()
        except OSError as error:
            # Never made, or somebody else has a drop-in there.
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                logger.warning("the time limit of the next %s may not hold: %s", name, error)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.d" / _FILE


def _now() -> int:
    return time.monotonic_ns() // 1000
