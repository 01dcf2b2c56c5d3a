"""Why this process is told to stop: what systemd has queued for the unit it runs in."""

from __future__ import annotations

import asyncio
import logging
import os
from enum import StrEnum

from worker.errors import BusGone, BusTimeout, SystemdError
from worker.systemd.bus import MANAGER_PATH, SYSTEMD, Bus

logger = logging.getLogger(__name__)

_LIMIT_SEC = 2.0
_RETRY_SEC = 0.05
_NO_UNIT = frozenset(f"{SYSTEMD}.{name}" for name in ("NoUnitForPID", "NoSuchUnit"))
_NO_OBJECT = "org.freedesktop.DBus.Error.UnknownObject"


class StopReason(StrEnum):
    """What is going to happen to the service whose process got a signal to stop."""

    RESTART = "restart"
    """It is started again: `systemctl restart` and `try-restart`, an upgrade of its package, a
    unit it is PartOf= restarted. Or nobody can tell."""
    STOP = "stop"
    """It stays stopped: `systemctl stop` or `isolate`, a unit it needs was stopped."""
    SHUTDOWN = "shutdown"
    """All goes: the machine is shut down or rebooted, or the user's manager ends."""
    SIGNAL = "signal"
    """systemd has nothing to do with it: `kill`, `systemctl kill`, Ctrl-C, or no service at all.
    With Restart=always a service is started again after this as well."""


async def stop_reason(bus: Bus, limit: float = _LIMIT_SEC) -> StopReason:
    """Why this process is told to stop; an answer in ``limit`` seconds, whatever the bus does.

    To be asked when the signal has come and before the process ends. A lost bus is waited for.
    Where it does not come back the answer is RESTART: units can be stopped over the bus only, so
    leaving them to the next agent is all that can be done, and it loses nothing. Each still has
    its time limit, and a machine that is shutting down ends them by itself.

    The service must be ordered After=dbus.service and After=dbus.socket: otherwise, at shutdown,
    the bus may be gone before the agent asks.
    """
    try:
        async with asyncio.timeout(limit):
            while True:
                try:
                    if (reason := await _ask(bus)) is not None:
                        return reason
                except (BusGone, BusTimeout) as error:
                    logger.debug("cannot ask why: %s", error)
                    await bus.wait_connected()
                    await asyncio.sleep(_RETRY_SEC)
    except (TimeoutError, SystemdError) as error:
        logger.warning(
            "cannot learn from systemd why this process is told to stop (%s): taken for a restart",
            str(error) or f"no answer in {limit:g} s",
        )
        return StopReason.RESTART


async def all_stops(bus: Bus, limit: float = _LIMIT_SEC) -> bool:
    """The machine is shut down or rebooted, or the user's manager ends: every unit is stopped.

    This holds from before the first unit is told to stop. An answer in ``limit`` seconds; where
    systemd gives none, False.
    """
    try:
        async with asyncio.timeout(limit):
            return await _is_stopping(bus)
    except (TimeoutError, SystemdError) as error:
        logger.warning(
            "cannot learn from systemd whether the machine is being shut down: %s",
            str(error) or f"no answer in {limit:g} s",
        )
        return False


async def _is_stopping(bus: Bus) -> bool:
    # "stopping" is true while shutdown.target is active or queued, org.freedesktop.systemd1(5).
    return await bus.get(MANAGER_PATH, "Manager", "SystemState") == "stopping"


async def _ask(bus: Bus) -> StopReason | None:
    """What is queued; None if it was replaced by something else at this moment."""
    if await _is_stopping(bus):
        return StopReason.SHUTDOWN
    try:
        (path,) = await bus.call("GetUnitByPID", "u", [os.getpid()])
        job = await bus.get(str(path), "Unit", "Job")
        assert isinstance(job, list)
        number, job_path = job
        if not number:
            return StopReason.SIGNAL
        kind = await bus.get(job_path, "Job", "JobType")
    except SystemdError as error:
        if error.name in _NO_UNIT:
            return StopReason.SIGNAL
        if error.name == _NO_OBJECT:
            return None
        raise
    if kind in ("restart", "try-restart"):
        return StopReason.RESTART
    # A start job is pending while a service is starting, and has no part in its stop.
    return StopReason.STOP if kind == "stop" else StopReason.SIGNAL
