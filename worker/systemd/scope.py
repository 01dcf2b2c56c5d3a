"""Limits for processes that run already: attached to a scope, and let go again.

Scopes (systemd.scope(5)) hold processes that somebody else started. Nothing here ever sends a
signal: processes are moved into the scope's cgroup and out of it. The scope belongs to systemd, so
it needs nobody to live on, and goes by itself with its last process.

The race this file prevents: a process forks while it is being moved. A child is born into its
parent's cgroup, so once a parent is inside, all its later children are; children born before that
are looked for until none is left outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import NoReturn

from worker.errors import NoSuchUnit, PropertyRejected, SystemdError, UnitExists
from worker.systemd.attachment import (
    ATTACHED_SCOPES,
    NO_LIMIT,
    RUNTIME_LIMIT_SINCE,
    USEC,
    Attached,
    AttachError,
    Detached,
    ScopeLimits,
    attachable,
    limit_properties,
    not_attached,
    scope_name,
    scope_properties,
)
from worker.systemd.bus import DENIED, MANAGER, Bus
from worker.systemd.launcher import parse_version
from worker.systemd.library import Variant
from worker.systemd.names import object_path
from worker.systemd.processes import Process, Processes, limits_in_force
from worker.systemd.property import Property
from worker.systemd.usage import CGROUP_ROOT

logger = logging.getLogger(__name__)

_ROUNDS = 50
_SETTLE_SEC = 30.0
_LOOK_SEC = 0.5
_EMPTY_SEC = 3.0


async def attachments(bus: Bus) -> frozenset[str]:
    """Names of the scopes that hold attached processes now."""
    body = [["active"], [ATTACHED_SCOPES]]
    (rows,) = await bus.call("ListUnitsByPatterns", "asas", body)
    assert isinstance(rows, list)
    return frozenset(row[0] for row in rows)


class Scopes:
    """Attaches and detaches over one connection. ``user``: the user's own manager."""

    def __init__(
        self,
        *,
        user: bool = False,
        address: str | None = None,
        processes: Processes | None = None,
        cgroup_root: Path = Path(CGROUP_ROOT),
    ) -> None:
        self._news = asyncio.Event()
        self.bus = Bus(
            user=user,
            address=address,
            matches=[
                f"type='signal',interface='{MANAGER}',member='{member}'"
                for member in ("JobRemoved", "UnitRemoved")
            ],
            on_signal=lambda _message: self._news.set(),
            on_resync=self._news.set,
        )
        self._processes = processes or Processes()
        self._cgroup_root = cgroup_root
        self._version = 0

    async def connect(self) -> None:
        """Raises SystemdError, naming the address."""
        await self.bus.connect()
        version = await self.bus.get("/org/freedesktop/systemd1", "Manager", "Version")
        self._version = parse_version(str(version))

    async def close(self) -> None:
        await self.bus.close()

    async def attach(self, pid: int, limits: ScopeLimits) -> Attached:
        """Put a process and its descendants under limits, and see what holds.

        Raises AttachError if that process must not or cannot be attached, SystemdError if
        systemd cannot be asked. Either way all processes go on.
        """
        if limits.runtime_sec is not None and self._version < RUNTIME_LIMIT_SINCE:
            raise AttachError(
                f"systemd {self._version} cannot end a scope after a time"
                f" ({RUNTIME_LIMIT_SINCE} can): leave out --timeout"
            )
        look, unit = self._processes, scope_name(pid)
        family = attachable(look, pid)
        process = family[0]
        came_from = look.unit(pid)
        held = sum(look.anonymous_bytes(member.pid) for member in family)
        description = f"{process.name} (PID {pid}) under limits"
        moved: dict[int, Process] = {}

        def wanted() -> list[Property]:
            members = attachable(look, pid)
            if members[0].started != process.started:
                raise AttachError(f"process {pid} ended before it could be limited")
            if moved:
                # Asked again: one that had ended made systemd refuse them all, and of a family
                # that forks all the time one always has. The others are brought in one by one.
                del members[1:]
            moved.update((member.pid, member) for member in members)
            pids = [member.pid for member in members]
            return scope_properties(pids, description) + limit_properties(limits)

        try:
            await self._start(unit, wanted)
        except UnitExists:
            raise AttachError(
                f"{unit} still holds children of an earlier process {pid}:"
                f" ffmpeg-worker detach {pid} lets them go, then try again"
            ) from None
        outside = await self._complete(unit, pid, moved)
        inside = await self._members(unit)
        if any(self._is_another(moved[member]) for member in inside & moved.keys()):
            await self.detach(pid)
            raise AttachError(
                f"a process ended and its PID went to another while {pid} was attached:"
                " nothing is limited, try again"
            )
        if pid not in inside:
            self._explain(process, unit, inside)
        return Attached(
            unit=unit,
            process=process,
            pids=inside,
            outside=outside,
            held_bytes=held,
            came_from=came_from,
            in_force=limits_in_force(unit, look.cgroups(pid), self._cgroup_root),
            runtime_sec=await self._runtime(unit),
        )

    async def detach(self, pid: int) -> Detached:
        """Move all processes out of the scope of ``pid``; they go on without limits.

        They end up in a scope of their own, ``ffmpeg-detached-<pid>.scope``, in the slice that
        systemd takes for scopes: only a new unit can be without RuntimeMaxSec=, which is not to
        be changed while a unit runs. Raises AttachError if nothing is attached under that PID.
        """
        old, new = scope_name(pid), ""
        if not await self._is_loaded(old):
            raise AttachError(not_attached(self._processes, pid))
        for number in range(_ROUNDS):
            remaining = await self._members(old)
            if not remaining:
                break
            if new:
                await self._add(new, remaining)
                continue
            try:
                first = remaining if number == 0 else [pid if pid in remaining else min(remaining)]
                new = await self._start_detached(pid, first)
            except SystemdError:
                if remaining <= await self._members(old):
                    raise  # not because they have ended
        else:
            raise AttachError(f"processes of {old} fork faster than they can be moved: try again")
        await self._wait_unloaded(old)
        inside = await self._members(new) if new else frozenset()
        return Detached(new if inside else "", inside)

    async def _start_detached(self, pid: int, members: Iterable[int]) -> str:
        description = f"PID {pid} and its children, limits lifted"
        # An earlier scope may live on with a child that has lost its parent.
        for suffix in ("", *(f"-{number}" for number in range(2, _ROUNDS))):
            new = f"ffmpeg-detached-{pid}{suffix}.scope"
            try:
                await self._start(new, lambda: scope_properties(sorted(members), description))
            except UnitExists:
                continue
            return new
        raise AttachError(f"too many scopes ffmpeg-detached-{pid}-… exist: stop some of them")

    async def _start(self, unit: str, wanted: Callable[[], list[Property]]) -> None:
        """Start a scope; returns when it is up, or over again. UnitExists if there is one.

        ``wanted`` gives the properties at the moment of each attempt.
        """
        rejected: set[str] = set()
        last: list[Property] = []
        while True:
            properties = [item for item in wanted() if item.name not in rejected]
            rows = [[item.name, Variant(item.signature, item.value)] for item in properties]
            try:
                await self.bus.call(
                    "StartTransientUnit", "ssa(sv)a(sa(sv))", [unit, "fail", rows, []]
                )
                break
            except UnitExists:
                raise
            except PropertyRejected as error:
                if not any(p.optional for p in properties if p.name == error.property_name):
                    raise
                rejected.add(error.property_name)
            except SystemdError as error:
                if error.name in DENIED:
                    raise AttachError(
                        f"not permitted to start {unit}: run this as root, or with --user for"
                        " processes of your own"
                    ) from None
                # A process that has ended makes systemd refuse: see what is wanted now.
                if not error.name or properties == last:
                    raise
                last = properties

        async def settled() -> bool:
            return not await self._start_job(unit)

        await self._until(settled, f"{unit} did not start")

    async def _complete(self, unit: str, pid: int, moved: dict[int, Process]) -> frozenset[int]:
        """Bring in the descendants born while the others were moved; returns who is still out."""
        outside: frozenset[int] = frozenset()
        for _ in range(_ROUNDS):
            inside = await self._members(unit)
            family = {member.pid: member for member in self._processes.family(pid)}
            outside = frozenset(family) - inside
            if not inside or not outside:
                break
            moved.update((other, family[other]) for other in outside)
            await self._add(unit, outside)
        return outside

    async def _add(self, unit: str, pids: Iterable[int]) -> None:
        """Move processes into a running scope, one by one: one that has ended fails alone."""
        for pid in pids:
            try:
                await self.bus.call("AttachProcessesToUnit", "ssau", [unit, "", [pid]])
            except SystemdError as error:
                if not error.name:
                    raise
                logger.debug("process %d is not moved into %s: %s", pid, unit, error)

    def _is_another(self, known: Process) -> bool:
        """The PID belongs to another process by now."""
        now = self._processes.get(known.pid)
        return now is not None and now.started != known.started

    def _explain(self, process: Process, unit: str, inside: frozenset[int]) -> NoReturn:
        now = self._processes.get(process.pid)
        if now is not None and not now.ended and now.started == process.started:
            raise AttachError(
                f"systemd could not move process {process.pid} into {unit}, is it another user's?"
                f" journalctl -u {unit} says more"
            )
        if inside:
            raise AttachError(
                f"process {process.pid} ended meanwhile; {len(inside)} of its children are limited"
                f" in {unit}: ffmpeg-worker detach {process.pid} lets them go"
            )
        raise AttachError(f"process {process.pid} ended before it could be limited")

    async def _wait_unloaded(self, unit: str) -> None:
        """An empty scope ends by itself; where the kernel does not tell systemd so, by us."""
        loop = asyncio.get_running_loop()
        patience = loop.time() + _EMPTY_SEC

        async def settled() -> bool:
            nonlocal patience
            if not await self._is_loaded(unit):
                return True
            if loop.time() > patience and not await self._members(unit):
                patience = loop.time() + _SETTLE_SEC
                await self.bus.call("StopUnit", "ss", [unit, "fail"])
            return False

        await self._until(settled, f"the processes are free, but {unit} is still loaded")

    async def _is_loaded(self, unit: str) -> bool:
        try:
            await self.bus.call("GetUnit", "s", [unit])
        except NoSuchUnit:
            return False
        return True

    async def _start_job(self, unit: str) -> int:
        """The id of the unit's job; 0 if it has none."""
        (rows,) = await self.bus.call("ListUnitsByNames", "as", [[unit]])
        assert isinstance(rows, list)
        return int(rows[0][7])

    async def _members(self, unit: str) -> frozenset[int]:
        """The processes of a unit that still run; empty if there is no such unit."""
        try:
            (rows,) = await self.bus.call("GetUnitProcesses", "s", [unit])
        except NoSuchUnit:
            return frozenset()
        assert isinstance(rows, list)
        pids = (int(row[1]) for row in rows)
        return frozenset(p for p in pids if (now := self._processes.get(p)) and not now.ended)

    async def _runtime(self, unit: str) -> float | None:
        if self._version < RUNTIME_LIMIT_SINCE:
            return None
        value = await self.bus.get(object_path(unit), "Scope", "RuntimeMaxUSec")
        return value / USEC if isinstance(value, int) and value < NO_LIMIT else None

    async def _until(self, settled: Callable[[], Awaitable[bool]], trouble: str) -> None:
        """Look whenever systemd says something, and now and then in case that was lost."""
        try:
            async with asyncio.timeout(_SETTLE_SEC):
                while True:
                    self._news.clear()
                    if await settled():
                        return
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_LOOK_SEC):
                            await self._news.wait()
        except TimeoutError:
            raise SystemdError(
                f"{trouble} after {_SETTLE_SEC:g} s: see systemctl list-jobs"
            ) from None
