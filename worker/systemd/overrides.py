"""Limits of a running unit that an operator has changed, as with `systemctl set-property`.

systemd announces no such change on D-Bus. But it writes a drop-in for it, and for a transient
unit to a folder beside the unit's own file, with --runtime or without. So a look at that folder
shows whether there may be something to read. The folder goes with the unit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from worker.errors import BusGone, BusTimeout, SystemdError
from worker.systemd.cgroup import read_text
from worker.systemd.launcher import Launcher
from worker.systemd.names import object_path
from worker.systemd.state import UNSET
from worker.systemd.suspend import SYSTEM_FOLDER
from worker.systemd.unit import Unit
from worker.systemd.usage import CGROUP_ROOT

logger = logging.getLogger(__name__)

Number = int | float | None
Changes = Mapping[str, tuple[Number, Number]]
"""By the name of a limit in UnitLimits: what was asked for, and what holds; None is no limit."""

_Stamp = tuple[int, int] | None
_MIB = 1 << 20
_SETTLED_SEC = 1.0
"""A change may have left the folder's time stamp as it was, which moves in small steps; and
`systemctl revert` removes drop-ins some time before systemd reads what is left. So each change is
read twice, the second time when that is over."""


@dataclass(frozen=True, slots=True)
class _Field:
    """A limit: its name in UnitLimits, its property, and as people see it."""

    name: str
    property: str
    shown: str
    per_unit: int = 1
    """How many of systemd's units are one of UnitLimits'."""
    divisor: int = 1
    suffix: str = ""

    def number(self, raw: int) -> Number:
        if raw == UNSET:
            return None
        return raw // self.per_unit if raw % self.per_unit == 0 else raw / self.per_unit

    def text(self, value: Number) -> str:
        return "none" if value is None else f"{value / self.divisor:.10g}{self.suffix}"


_FIELDS = (
    _Field("cpu_percent", "CPUQuotaPerSecUSec", "CPUQuota", per_unit=10_000, suffix="%"),
    _Field("memory_bytes", "MemoryMax", "MemoryMax", divisor=_MIB, suffix=" MB"),
    _Field("cpu_weight", "CPUWeight", "CPUWeight"),
    _Field("tasks_max", "TasksMax", "TasksMax"),
    _Field("io_weight", "IOWeight", "IOWeight"),
)
_MEMORY = _FIELDS[1]


class Overrides:
    """The limits of one unit, as somebody else may have changed them."""

    def __init__(
        self,
        launcher: Launcher,
        unit: Unit,
        folder: Path | None = None,
        *,
        user: bool = False,
        cgroups: Path = Path(CGROUP_ROOT),
    ) -> None:
        """``user`` as for the launcher; ``folder`` where its manager keeps transient units."""
        folder = folder or transient_folder(user=user)
        self._launcher, self._unit, self._cgroups = launcher, unit, cgroups
        self._folder = str(folder / f"{unit.name}.d")
        self._seen: _Stamp = None
        self._pending = False
        self._seen_at = 0.0
        self._changes: Changes = {}
        self._refused: int | None = None

    def noticed(self) -> bool:
        """Something may have changed: read() would tell. Costs one look at a folder."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen, self._seen_at, self._pending = stamp, time.monotonic(), True
        return self._pending

    async def read(self) -> Changes:
        """The limits that differ from those the unit was started with.

        What was read last, once the unit is not loaded any more; so it should be read after the
        unit's end and before it is reaped. Likewise where systemd does not answer, and noticed()
        then goes on to say so.
        """
        self.noticed()
        if self._unit.state.vanished:
            self._pending = False
            return self._changes
        stamp, settled = self._seen, time.monotonic() - self._seen_at >= _SETTLED_SEC
        try:
            values = await asyncio.gather(
                *(self._get("Service", each.property) for each in _FIELDS)
            )
            loaded = await self._get("Unit", "LoadState") == "loaded"
        except (BusGone, BusTimeout) as error:
            logger.debug("%s: its limits cannot be read now: %s", self._unit.name, error)
            return self._changes
        if loaded:  # else these were the values of no unit
            self._changes = self._differing(values)
        if settled and stamp == self._seen:
            self._pending = False
        return self._changes

    def _differing(self, values: list[object]) -> Changes:
        changes = {}
        for each, value in zip(_FIELDS, values, strict=True):
            asked = getattr(self._unit.launch.limits, each.name)
            if asked is not None:
                asked = max(1, asked)
            if isinstance(value, int) and (now := each.number(value)) != asked:
                if each is _MEMORY and self._is_refused(value):
                    continue
                changes[each.name] = (asked, now)
        return changes

    def _is_refused(self, wanted: int) -> bool:
        """cgroup v1 does not lower a limit below what is in use; systemd tells it all the same."""
        group = self._unit.state.control_group
        text = read_text(f"{self._cgroups}/memory{group}/memory.limit_in_bytes") if group else None
        if text is None:  # v2, or over: then it is as it was
            return wanted == self._refused
        if int(text) <= wanted:
            return False
        if wanted != self._refused:
            self._refused = wanted
            logger.warning(
                "%s: MemoryMax of %s is not in force, as more is in use: cgroup v1 cannot take it"
                " away from a job", self._unit.name, _MEMORY.text(wanted),
            )  # fmt: skip
        return True

    async def _get(self, interface: str, name: str) -> object:
        try:
            return await self._launcher.bus.get(object_path(self._unit.name), interface, name)
        except (BusGone, BusTimeout):
            raise
        except SystemdError as error:  # of a systemd that has no such property
            logger.debug("%s: no %s: %s", self._unit.name, name, error)
            return None

    def _stamp(self) -> _Stamp:
        try:
            found = os.stat(self._folder)  # noqa: PTH116 - asked for every unit, again and again
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns


def described(changes: Changes) -> str:
    """``CPUQuota 200% → 50%, MemoryMax 500 MB → none``"""
    return ", ".join(
        f"{each.shown} {each.text(changes[each.name][0])} → {each.text(changes[each.name][1])}"
        for each in _FIELDS
        if each.name in changes
    )


def transient_folder(*, user: bool) -> Path:
    """Where the manager keeps transient units, systemd.unit(5)."""
    if not user:
        return SYSTEM_FOLDER
    return Path(
        os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}", "systemd/transient"
    )
