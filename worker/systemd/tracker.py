"""Follows units to their end.

The races this file prevents: the end of a unit announced before anybody waits for it, after its
start job is reported, twice, or not at all (bus lost); a unit taken for finished because it is
still, or again, inactive; a verdict overwritten by the clean-up. So signals only record and wake;
what is true is read, in one call for all units in question, and the first complete verdict stands.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from worker.errors import BusGone, SystemdError
from worker.systemd.bus import MANAGER, PROPERTIES, SYSTEMD, Bus, plain
from worker.systemd.library import Message
from worker.systemd.names import object_path
from worker.systemd.state import UnitState

logger = logging.getLogger(__name__)

_SERVICE = f"{SYSTEMD}.Service"
# Only what carries a verdict: all of systemd's signals cost more than the jobs they are about.
MATCHES = (
    f"type='signal',interface='{PROPERTIES}',member='PropertiesChanged',"
    f"path_namespace='/org/freedesktop/systemd1/unit',arg0='{_SERVICE}'",
    f"type='signal',interface='{MANAGER}',member='JobRemoved'",
    f"type='signal',interface='{MANAGER}',member='UnitRemoved'",
    f"type='signal',interface='{MANAGER}',member='Reloading'",
)
# In the body of a PropertiesChanged: the name, its value's signature, and the value with its size.
_SUCCESS = re.compile(rb"\x00Result\x00\x01s\x00+\x07\x00{3}success\x00")
_INSURANCE_SEC = 60.0
_RETRY_SEC = 1.0
_LOOK_SEC = 120.0
"""A look takes two calls at most for each unit, and a call has its own time limit."""


class Tracked:
    """What is known of one unit, from before its start until it is forgotten."""

    def __init__(self, name: str, control_group: str = "") -> None:
        self.name = name
        self.path = object_path(name)
        self.live = UnitState(control_group=control_group)
        """All that was announced or read so far."""
        self.final: UnitState | None = None
        """The state at the end; what comes later is of the clean-up."""
        self.done = asyncio.Event()
        """The final state is known, or will not be because tracking was closed."""
        self.job_done = asyncio.Event()
        self.job_result = ""
        """Of the start job: done, failed, canceled, …; empty if nobody told us."""
        self.gone = asyncio.Event()
        """A hint that the unit may have been unloaded."""
        self.unloaded = False
        """More than a hint: systemd said so, and not because it loads all units again."""
        self.last_body = b""
        """Of the last PropertiesChanged."""
        self.output_begin = 0
        """Size of the file for standard output before the start."""
        self.armed = False
        self.job = ""
        """Object path of the start job; empty if it was never told."""
        self._removed_jobs: dict[str, str] = {}

    @property
    def state(self) -> UnitState:
        return self.final or self.live

    def restart(self) -> None:
        """Forget what was seen of an earlier unit of this name."""
        self.live = UnitState(control_group=self.live.control_group)
        self.last_body = b""
        self._removed_jobs.clear()

    def job_started(self, job: str) -> None:
        """The start job's path is known; its end may have been announced already."""
        self.job = job
        if job in self._removed_jobs:
            self._job_ended(self._removed_jobs[job])

    def job_removed(self, job: str, result: str) -> None:
        if job == self.job:
            self._job_ended(result)
        else:
            self._removed_jobs[job] = result

    def _job_ended(self, result: str) -> None:
        self.job_result = result
        self.job_done.set()

    def expect_removal(self) -> None:
        """What was said of an earlier one does not count."""
        self.gone.clear()
        self.unloaded = False

    def freeze(self) -> None:
        self.final = replace(self.live, main_pid=0)
        self.job_done.set()
        self.done.set()


class Tracker:
    """Keeps every Tracked up to date."""

    def __init__(self, bus: Bus) -> None:
        self.beat: Callable[[float], None] = lambda _seconds: None
        """Called in each round with the time in which the next call comes if all is well."""
        self._bus = bus
        self._units: dict[str, Tracked] = {}
        self._paths: dict[str, Tracked] = {}
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._reloading = False

    @property
    def unfinished(self) -> int:
        """How many units are followed whose end is not known."""
        return sum(unit.final is None for unit in self._units.values())

    def open(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._reconcile(), name="unit tracker")

    async def close(self) -> None:
        """Stop tracking and wake everybody who waits."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for unit in list(self._units.values()):
            for event in (unit.job_done, unit.done, unit.gone):
                event.set()
            self.forget(unit)

    def get(self, name: str) -> Tracked | None:
        return self._units.get(name)

    def track(self, name: str, control_group: str = "") -> Tracked:
        """Begin to record what is announced of a unit. To be called before it is started."""
        unit = Tracked(name, control_group)
        self._units[name] = self._paths[unit.path] = unit
        return unit

    def forget(self, unit: Tracked) -> None:
        self._units.pop(unit.name, None)
        self._paths.pop(unit.path, None)
        self._dirty.discard(unit.name)

    def arm(self, unit: Tracked, job: str = "") -> None:
        """The unit exists: from now on its absence means that it went away."""
        unit.armed = True
        unit.job_started(job)
        if not job or _may_be_over(unit.live) or unit.job_result not in ("", "done"):
            self.mark(unit)

    def mark(self, unit: Tracked) -> None:
        """Have a look at this unit."""
        if unit.armed and unit.final is None:
            self._dirty.add(unit.name)
            self._wake.set()

    def resync(self) -> None:
        """Have a look at all units: something may have been missed."""
        for unit in self._units.values():
            unit.gone.set()
            unit.last_body = b""
            self.mark(unit)

    def reconnected(self) -> None:
        """systemd has answered our subscription: it loads no units just now."""
        self._reloading = False
        self.resync()

    def needless(self, path: str, member: str, body: bytes) -> bool:
        """Whether this signal of systemd tells nothing new of any unit that is followed."""
        if member == "PropertiesChanged":
            return self._is_known(path, body)
        # Each start loads and drops units of mount points that are none.
        return member == "UnitRemoved" and _first_string(body) not in self._units

    def _is_known(self, path: str, body: bytes) -> bool:
        """Of about ten PropertiesChanged for a unit that ends well, two say something new."""
        unit = self._paths.get(path)
        if unit is None:
            return True
        if unit.final is not None:
            # Only that the clean-up failed would be news.
            return _SUCCESS.search(body) is not None
        if body != unit.last_body:
            unit.last_body = body
            return False
        if _may_be_over(unit.live):
            self.mark(unit)  # the same again, because something else has changed
        return True

    async def rows(self, names: Iterable[str]) -> dict[str, dict[str, object]]:
        """LoadState, ActiveState, SubState and Job of units, all taken at one moment."""
        (rows,) = await self._bus.call("ListUnitsByNames", "as", [list(names)])
        assert isinstance(rows, list)
        return {row[0]: parse_row(row) for row in rows}

    def on_signal(self, message: Message) -> None:
        match message.member:
            case "PropertiesChanged":
                unit = self._paths.get(message.path)
                if unit is not None and message.body[0] == _SERVICE:
                    unit.live = unit.live.folded(plain(message.body[1]))
                    if _may_be_over(unit.live):
                        self.mark(unit)
            case "JobRemoved":
                _id, job, name, result = message.body
                if unit := self._units.get(name):
                    unit.job_removed(job, result)
                    if unit.live.result not in ("", "success"):
                        unit.gone.set()  # a stop that ends in `failed`: no UnitRemoved follows
                    if result != "done" or job != unit.job:
                        self.mark(unit)
            case "UnitRemoved":
                # Sent for every unit at each daemon-reload, too: then a reason to look, no more.
                if unit := self._units.get(message.body[0]):
                    # Not connected yet: the begin of a reload may have been missed.
                    unit.unloaded = self._bus.connected and not self._reloading
                    unit.gone.set()
                    self.mark(unit)
            case "Reloading":
                self._reloading = message.body != [False]
                if not self._reloading:
                    self.resync()

    async def _reconcile(self) -> None:
        while True:
            self.beat(_INSURANCE_SEC + _LOOK_SEC)
            try:
                async with asyncio.timeout(_INSURANCE_SEC):
                    await self._wake.wait()
            except TimeoutError:
                self.resync()
            self._wake.clear()
            names = sorted(self._dirty)
            self._dirty.clear()
            if not names:
                continue
            try:
                for name, row in (await self.rows(names)).items():
                    if (unit := self._units.get(name)) and unit.armed and unit.final is None:
                        self.beat(_LOOK_SEC)
                        await self._apply(unit, row)
            except BusGone as error:
                logger.debug("cannot look at %d units: %s", len(names), error)
                self._again(names)
                self.beat(math.inf)  # the bus is away for as long as it is away
                await self._bus.wait_connected()
                # Connected, yet the call failed: systemd is about to leave or to come back.
                await asyncio.sleep(_RETRY_SEC / 10)
            except SystemdError as error:
                logger.warning("cannot look at %d units, will try again: %s", len(names), error)
                self._again(names)
                await asyncio.sleep(_RETRY_SEC)
            except Exception:
                # Without this task no end would ever be seen again.
                logger.exception("cannot look at %d units, will try again", len(names))
                self._again(names)
                await asyncio.sleep(_RETRY_SEC)

    async def _apply(self, unit: Tracked, row: dict[str, object]) -> None:
        state = unit.live.folded(row)
        missed = not state.exec_main_code and (state.finished or not state.main_pid)
        if missed and state.load_state != "not-found":
            # Announced while nobody listened; or an end without a process, which is rare too.
            state = state.folded(await self._bus.get_all(unit.path, "Service"))
        # The row alone says where the unit is; what was folded meanwhile is newer in the rest.
        unit.live = state.folded(_fresh(unit.live)).folded(row)
        if unit.live.job_id == 0:
            unit.job_done.set()
        if unit.live.finished:
            unit.freeze()

    def _again(self, names: Iterable[str]) -> None:
        for name in names:
            if unit := self._units.get(name):
                self.mark(unit)


def parse_row(row: list[object]) -> dict[str, object]:
    """A row of ListUnitsByNames as the properties it stands for."""
    return {
        "LoadState": row[2],
        "ActiveState": row[3],
        "SubState": row[4],
        "Job": [row[7], row[9]],
    }


def _first_string(body: bytes) -> str:
    return body[4 : 4 + int.from_bytes(body[:4], "little")].decode()


def _may_be_over(state: UnitState) -> bool:
    return state.exec_main_code > 0 or state.result not in ("", "success")


def _fresh(state: UnitState) -> dict[str, object]:
    """What signals said of the process, as properties, where they said anything."""
    if not state.exec_main_code:
        return {}
    return {
        "Result": state.result,
        "ExecMainCode": state.exec_main_code,
        "ExecMainStatus": state.exec_main_status,
    }
