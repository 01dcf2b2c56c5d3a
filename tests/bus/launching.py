"""Starts that a test holds up, and the launchers that make them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from worker.systemd.launch import Launch
from worker.systemd.launcher import Launcher
from worker.systemd.unit import Unit

if TYPE_CHECKING:
    from .conftest import Systemd

ONE = "ffmpeg-job-one.service"
"""The unit of all tests that need one."""


@contextlib.asynccontextmanager
async def connected(**options: Any) -> AsyncIterator[Launcher]:
    launcher = Launcher(**options)
    await launcher.connect()
    try:
        yield launcher
    finally:
        await launcher.close()


async def start_waiting(systemd: Systemd, launcher: Launcher, launch: Launch) -> asyncio.Task[Unit]:
    """A start whose job waits until it is told to run."""
    systemd.Automatic(False)
    starting = asyncio.create_task(launcher.start(launch))
    await until(lambda: armed(launcher))
    return starting


async def start_unanswered(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> asyncio.Task[Unit]:
    """A start that systemd was asked for, and does not answer."""
    systemd.Hang(["StartTransientUnit"])
    starting = asyncio.create_task(launcher.start(launch))
    await until(lambda: ONE in systemd.Started())
    return starting


def hurry(unit: Unit) -> None:
    """Have it given up 0.4 s after an order to stop."""
    unit.launch = replace(unit.launch, stop_timeout_sec=-0.92)


def armed(launcher: Launcher) -> bool:
    unit = launcher.tracker.get(ONE)
    return unit is not None and unit.armed


async def until(condition: Callable[[], bool], timeout: float = 10) -> None:
    """Wait for something that has no event of its own."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)
