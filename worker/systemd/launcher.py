"""Starts transient units, waits for them, stops them and clears them away.

Promises: a unit is never started twice, a running unit that is not ours is never stopped by a
start, and a unit whose fate is unknown (bus lost during the call) is looked for, not assumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Container
from functools import partial
from typing import TypeVar

from worker.errors import (
    BusGone,
    BusTimeout,
    NoSuchUnit,
    PropertyRejected,
    SystemdError,
    UnitExists,
)
from worker.systemd.bus import Bus
from worker.systemd.cgroup import CgroupMeter
from worker.systemd.fieldfiles import FieldFiles
from worker.systemd.launch import Launch
from worker.systemd.library import SignatureBodyMismatchError, Variant
from worker.systemd.names import JOB_UNITS, slice_cgroup
from worker.systemd.properties import properties
from worker.systemd.property import Property
from worker.systemd.state import UnitState, counter
from worker.systemd.tracker import MATCHES, Tracked, Tracker, parse_row
from worker.systemd.unit import Unit, size_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

_UNLOAD_LOOK_SEC = 2.0
_RETRY_SEC = 0.1
_REMAINS_SEC = 30.0
_CLOSE_SEC = 10.0


class Launcher:
    """One connection to systemd, many units.

    ``user`` talks to the user's own manager instead of the system's. ``reconnect_timeout`` is how
    long, in seconds, a start waits while systemd cannot be reached; orders to end a unit wait for
    as long as it takes.
    """

    def __init__(
        self,
        *,
        user: bool = False,
        address: str | None = None,
        call_timeout: float = 25.0,
        reconnect_timeout: float = 30.0,
        meter: CgroupMeter | None = None,
    ) -> None:
        self.user = user
        self.bus = Bus(
            user=user,
            address=address,
            matches=MATCHES,
            on_signal=lambda message: self.tracker.on_signal(message),
            on_resync=lambda: self.tracker.reconnected(),
            needless=lambda path, member, body: self.tracker.needless(path, member, body),
            call_timeout=call_timeout,
        )
        self.tracker = Tracker(self.bus)
        self.meter = meter or CgroupMeter()
        self.version = 0
        """systemd's, e.g. 252; 0 before connect()."""
        self.never_counted: set[str] = set()
        """Properties of systemd's accounting that stay unset on this machine."""
        self._manager_cgroup = ""
        self._field_files = FieldFiles()
        self._reconnect_timeout = reconnect_timeout
        self._grep = shutil.which("grep")
        self._rejected: set[str] = set()
        self._cleanups: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        """The bus connection stands. It comes back by itself when lost."""
        return self.bus.connected

    async def connect(self) -> None:
        """Connect. Raises SystemdError, naming the address; may then be called again."""
        await self.bus.connect()
        version, cgroup = await asyncio.gather(
            *(
                self.bus.get("/org/freedesktop/systemd1", "Manager", name)
                for name in ("Version", "ControlGroup")
            )
        )
        self.version = parse_version(str(version))
        self._manager_cgroup = str(cgroup).rstrip("/")
        self.tracker.open()

    async def close(self) -> None:
        """Close the connection. Units go on; whoever waits for one gets BusGone."""
        if self._cleanups and self.connected:
            await asyncio.wait(self._cleanups, timeout=_CLOSE_SEC)
        for cleanup in self._cleanups:
            cleanup.cancel()
        await asyncio.gather(*self._cleanups, return_exceptions=True)
        await self.tracker.close()
        await self.bus.close()
        self._field_files.close()

    async def start(self, launch: Launch) -> Unit:
        """Start a unit; returns when it runs, or has ended or failed already.

        Raises UnitExists if a unit of that name is running (or is not reaped yet), BusGone or
        BusTimeout if it is not known whether it runs (it is ended once that can be seen), and
        SystemdError if systemd refused.
        """
        if self.tracker.get(launch.unit) is not None:
            raise UnitExists(f"{launch.unit} was started before and is not reaped yet")
        tracked = self.tracker.track(launch.unit, self.control_group(launch))
        self._field_files.unit_wanted(launch.unit)
        asked_usec = time.monotonic_ns() // 1000
        try:
            await self._request(launch, tracked, asked_usec)
            await tracked.job_done.wait()
            if tracked.job_result not in ("", "done"):
                # Over before it was up: not executable, or quick to fail. Which one, its end says.
                await tracked.done.wait()
        except (asyncio.CancelledError, BusGone, BusTimeout):
            # Nobody will hold the Unit, so whatever has been started is cleared away. Until then
            # the name is taken: a second start must not become what is ended here.
            cleanup = asyncio.create_task(self._give_up(tracked, asked_usec))
            self._cleanups.add(cleanup)
            cleanup.add_done_callback(self._cleanups.discard)
            raise
        except BaseException:
            self.tracker.forget(tracked)
            raise
        if self.tracker.get(launch.unit) is not tracked:
            raise BusGone(f"{launch.unit}: the launcher was closed during the start")
        return Unit(self, launch, tracked)

    def control_group(self, launch: Launch) -> str:
        """Where the unit's cgroup is, or will be."""
        return f"{self._manager_cgroup}{slice_cgroup(launch.slice)}/{launch.unit}"

    async def leftovers(self) -> list[str]:
        """Names of all loaded units of jobs, running or not."""
        (rows,) = await self.bus.call("ListUnitsByPatterns", "asas", [[], [JOB_UNITS]])
        assert isinstance(rows, list)
        return sorted(row[0] for row in rows if row[2] != "not-found")

    def sweep(self, loaded: Container[str]) -> None:
        """Remove what is left in /run of units that are not among the ``loaded`` ones."""
        self._field_files.sweep(loaded)

    async def stop_and_reap(self, unit_name: str, timeout: float = 60.0) -> None:
        """Stop a unit by name and wait until it is unloaded; no such unit is fine.

        Raises SystemdError if it is still there after ``timeout`` seconds.
        """
        row = await self._row(unit_name)
        if row["LoadState"] == "not-found":
            return
        tracked = self.tracker.get(unit_name)
        known = tracked is not None
        tracked = tracked or self.tracker.track(unit_name)
        try:
            await self.unload(tracked, failed=row["ActiveState"] == "failed", timeout=timeout)
        finally:
            if not known:
                self.tracker.forget(tracked)

    async def unload(self, unit: Tracked, *, failed: bool, timeout: float) -> None:
        """Stop, or reset if it failed, and wait until systemd has dropped the unit.

        Raises SystemdError when it has not after ``timeout`` seconds in which systemd answered.
        """
        left = timeout
        while True:
            begun = time.monotonic()
            if not await self._is_loaded_after(unit, failed=failed):
                self._field_files.unit_gone(unit.name)
                return
            # Failed in stopping, or run again by somebody.
            failed = (await self._row(unit.name))["ActiveState"] == "failed"
            # What took longer was spent waiting for an answer and says nothing of the unit.
            left -= min(time.monotonic() - begun, _UNLOAD_LOOK_SEC)
            if left <= 0:
                raise SystemdError(
                    f"{unit.name} is still loaded after {timeout:g} s. Probably one of its"
                    f" processes cannot be killed (stuck in I/O): see systemctl status {unit.name}"
                )

    async def repeat(self, member: str, signature: str, *body: object) -> list[object]:
        """A call that does no harm twice: made until systemd has answered it.

        Raises BusGone if the launcher is closed meanwhile.
        """
        return await self._repeat(partial(self.bus.call, member, signature, body))

    async def _repeat(self, call: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await call()
            except (BusGone, BusTimeout) as error:
                logger.debug("will be repeated: %s", error)
                await self.bus.wait_connected()
                # Connected and yet failed: systemd is about to go or has just come.
                await asyncio.sleep(_RETRY_SEC)

    async def _request(self, launch: Launch, tracked: Tracked, asked_usec: int) -> None:
        lost = reaped = False
        while True:
            if not lost and self.version >= 240:  # before, output is not appended
                tracked.output_begin = size_of(launch.stdout)
            try:
                body = [launch.unit, "fail", self._properties(launch, tracked), []]
                (job,) = await self.bus.call("StartTransientUnit", "ssa(sv)a(sa(sv))", body)
                self.tracker.arm(tracked, str(job))
                return
            except PropertyRejected as error:
                self._drop(launch, tracked, error)
            except UnitExists:
                if lost and await self._adopt(tracked, asked_usec):
                    return
                if reaped or not await self._reap_remains(tracked):
                    raise
                reaped = True
            except (BusGone, BusTimeout):
                if await self._adopt_soon(tracked, asked_usec):
                    return
                if lost:
                    raise
                lost = True

    def _properties(self, launch: Launch, tracked: Tracked) -> list[list[object]]:
        try:
            return [
                [item.name, Variant(item.signature, item.value)]
                for item in self._wanted(launch, tracked)
                if item.name not in self._rejected
            ]
        except SignatureBodyMismatchError as error:
            raise SystemdError(f"{launch.unit}: a limit is out of range: {error}") from None

    def _wanted(self, launch: Launch, tracked: Tracked) -> list[Property]:
        return properties(
            launch,
            version=self.version,
            grep=self._grep,
            record_files=self.meter.record_files(tracked.live.control_group),
            user=self.user,
        )

    def _drop(self, launch: Launch, tracked: Tracked, error: PropertyRejected) -> None:
        """Do without a property that this systemd does not know, where we can."""
        name = error.property_name
        optional = {item.name for item in self._wanted(launch, tracked) if item.optional}
        if name not in optional:
            raise error
        if name not in self._rejected:  # else another start has found out meanwhile
            self._rejected.add(name)
            logger.warning("systemd %d does not know %s=: units run without it", self.version, name)

    async def _reap_remains(self, tracked: Tracked) -> bool:
        """Clear away an ended unit of this name. False if it is not ended."""
        state = UnitState().folded(await self._row(tracked.name))
        if not state.finished:
            return False
        logger.info("%s is left over (%s), clearing it away", tracked.name, state.active_state)
        failed = state.active_state == "failed"
        await self.unload(tracked, failed=failed, timeout=_REMAINS_SEC)
        tracked.restart()
        return True

    async def _adopt_soon(self, tracked: Tracked, asked_usec: int) -> bool:
        """See what became of a start without an answer. Raises BusGone if that takes too long."""
        limit = self._reconnect_timeout
        try:
            async with asyncio.timeout(limit):
                return await self._adopt(tracked, asked_usec)
        except TimeoutError:
            raise BusGone(
                f"{tracked.name}: systemd cannot be reached over D-Bus for {limit:g} s, so it is"
                " not known whether the unit was started. If it was, it will be ended"
            ) from None

    async def _adopt(self, tracked: Tracked, asked_usec: int) -> bool:
        """Take over the unit if the call that seemed lost has started it. False if it has not."""
        if not await self._is_ours(tracked, asked_usec):
            return False
        tracked.live = tracked.live.folded(
            await self._repeat(partial(self.bus.get_all, tracked.path, "Service"))
        )
        self.tracker.arm(tracked)
        logger.info("%s was started although its start was not confirmed", tracked.name)
        return True

    async def _is_ours(self, tracked: Tracked, asked_usec: int) -> bool:
        """The unit is loaded, and began (CLOCK_MONOTONIC) after we asked for it."""
        if (await self._row(tracked.name))["LoadState"] == "not-found":
            return False
        values = await self._repeat(partial(self.bus.get_all, tracked.path, "Unit"))
        begun = counter(values.get("InactiveExitTimestampMonotonic"))
        return not begun or begun >= asked_usec  # zero: its start job is still waiting

    async def _row(self, name: str) -> dict[str, object]:
        """Where a unit is."""
        (rows,) = await self.repeat("ListUnitsByNames", "as", [name])
        assert isinstance(rows, list)
        return parse_row(rows[0])

    async def _is_loaded_after(self, unit: Tracked, *, failed: bool) -> bool:
        """Stop or reset the unit, then see whether that has unloaded it."""
        unit.expect_removal()
        try:
            if failed:
                await self.repeat("ResetFailedUnit", "s", unit.name)
            else:
                await self.repeat("StopUnit", "ss", unit.name, "replace")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_UNLOAD_LOOK_SEC):
                    await unit.gone.wait()
            if unit.unloaded:
                return False
            # Does not load the unit again just to say that it is not there.
            await self.repeat("GetUnit", "s", unit.name)
        except NoSuchUnit:
            return False
        return True

    async def _give_up(self, tracked: Tracked, asked_usec: int) -> None:
        try:
            if tracked.armed or await self._is_ours(tracked, asked_usec):
                await self.stop_and_reap(tracked.name)
        except SystemdError as error:
            logger.error("%s may be left over from a start given up: %s", tracked.name, error)
        except asyncio.CancelledError:
            logger.error("%s may be left over: systemd cannot be reached", tracked.name)
            raise
        finally:
            self.tracker.forget(tracked)

    async def read(self, path: str, interface: str, name: str) -> object:
        """A property of a loaded unit, asked for as in repeat()."""
        return await self._repeat(partial(self.bus.get, path, interface, name))


def parse_version(text: str) -> int:
    """The number in "252.38-1~deb12u1", "v245.4-1.fc32", "249"; 0 if there is none."""
    found = re.match(r"v?(\d+)", text)
    return int(found[1]) if found else 0
