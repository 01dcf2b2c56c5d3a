"""Limits that an operator changes while a job runs: in force, noticed, read, and judged by."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slowness import SLOWNESS
from tests.system.commands import run, until
from worker.errors import Reason
from worker.jobs.judge import judge
from worker.jobs.outcome import Intent
from worker.jobs.progress import LogFacts
from worker.jobs.spec import Limits
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher
from worker.systemd.overrides import Overrides, described
from worker.systemd.processes import InForce, Processes, limits_in_force
from worker.systemd.suspend import Suspension
from worker.systemd.unit import Unit

MIB = 1 << 20
V2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
PYTHON = shutil.which("python3") or sys.executable
SLEEP = ("/bin/sleep", "3600")
GROWS = f"""
import signal
some = bytearray({100 * MIB})
signal.signal(signal.SIGUSR1, lambda *_: None)
print(flush=True)
signal.pause()
more = bytearray({200 * MIB})
signal.pause()
"""
"""Has 100 MB from its first output on, and 300 MB from SIGUSR1 on."""


async def change(unit: Unit, *settings: str, how: tuple[str, ...] = ("--runtime",)) -> None:
    await run("systemctl", "set-property", *how, unit.name, *settings)


def in_force(unit: Unit) -> InForce:
    return limits_in_force(unit.name, Processes().cgroups(unit.state.main_pid))


def judged(unit: Unit, memory_mb: int, usage: Any) -> tuple[Reason | None, str]:
    limits = Limits(cpu_percent=100, memory_mb=memory_mb, disk_mb=100, timeout_sec=60)
    outcome = judge(unit.state, usage, Intent.NONE, LogFacts(), limits)
    return outcome.reason, outcome.message.partition(";")[0]


@pytest.fixture(autouse=True)
def nothing_of_a_change_is_left() -> Iterator[None]:
    """Looked at when the launcher's units are gone."""
    yield
    assert list(Path("/run/systemd/transient").glob("ffmpeg-job-*")) == []
    assert list(Path("/etc/systemd").glob("*.control/ffmpeg-job-*")) == []


async def started(launcher: Launcher, tmp_path: Path, *argv: str) -> Unit:
    return await launcher.start(
        Launch(
            unit="ffmpeg-job-one.service",
            description="a job that an operator takes an interest in",
            argv=argv,
            slice="ffmpeg-default.slice",
            limits=UnitLimits(cpu_percent=200, memory_bytes=500 * MIB, cpu_weight=100),
            stdout=tmp_path / "out",
            stop_timeout_sec=2 * SLOWNESS,
        )
    )


@pytest.mark.parametrize("how", [("--runtime",), ()], ids=["runtime", "persistent"])
async def test_what_was_changed_is_in_force_and_read(
    launcher: Launcher, tmp_path: Path, how: tuple[str, ...]
) -> None:
    unit = await started(launcher, tmp_path, *SLEEP)
    overrides = Overrides(launcher, unit)
    assert not overrides.noticed()
    assert await overrides.read() == {}
    await change(unit, "CPUQuota=50%", how=how)
    assert overrides.noticed()
    assert await overrides.read() == {"cpu_percent": (200, 50)}
    assert in_force(unit).cpu_percent == 50
    settings = ("MemoryMax=300M", "CPUWeight=77", "TasksMax=40", "IOWeight=33")
    for setting in settings:
        await change(unit, setting, how=how)
        assert overrides.noticed()
        await overrides.read()
    changes = await overrides.read()
    assert described(changes) == (
        "CPUQuota 200% → 50%, MemoryMax 500 MB → 300 MB, CPUWeight 100 → 77, TasksMax 512 → 40, "
        "IOWeight none → 33"
    )
    assert in_force(unit).memory_bytes == 300 * MIB
    await change(unit, "CPUQuota=", "MemoryMax=infinity", how=how)
    assert described(await overrides.read()).startswith(
        "CPUQuota 200% → none, MemoryMax 500 MB → none"
    )
    await run("systemctl", "revert", unit.name)
    await asyncio.sleep(1.1)  # as between two looks
    assert overrides.noticed()
    assert await overrides.read() == {}
    await unit.stop()
    await unit.reap()


async def test_it_settles(launcher: Launcher, tmp_path: Path) -> None:
    """A change is read twice, and what the agent itself writes there is none."""
    unit = await started(launcher, tmp_path, *SLEEP)
    overrides, suspension = Overrides(launcher, unit), Suspension(launcher)
    await suspension.pause(unit)
    assert overrides.noticed()
    assert await overrides.read() == {}
    await asyncio.sleep(1.1)
    assert overrides.noticed()
    assert await overrides.read() == {}
    assert not overrides.noticed()
    await suspension.resume(unit)
    await unit.stop()
    await unit.reap()
    await suspension.forget(unit)


async def test_the_next_agent_sees_it(launcher: Launcher, tmp_path: Path) -> None:
    unit = await started(launcher, tmp_path, *SLEEP)
    await change(unit, "CPUQuota=50%")
    overrides = Overrides(launcher, unit)
    assert overrides.noticed()
    assert await overrides.read() == {"cpu_percent": (200, 50)}
    await unit.stop()
    await unit.reap()


async def test_a_change_before_the_end_is_read_after_it(launcher: Launcher, tmp_path: Path) -> None:
    unit = await started(launcher, tmp_path, *SLEEP)
    overrides = Overrides(launcher, unit)
    await change(unit, "CPUQuota=50%")
    os.kill(unit.state.main_pid, signal.SIGKILL)
    await unit.finished()
    assert overrides.noticed()
    assert await overrides.read() == {"cpu_percent": (200, 50)}
    await unit.reap()
    assert overrides.noticed()
    assert await overrides.read() == {"cpu_percent": (200, 50)}, "as it was last"


async def test_a_unit_that_is_gone(launcher: Launcher, tmp_path: Path) -> None:
    """Whoever stopped it: there is nothing to be read, and nothing is made up."""
    unit = await started(launcher, tmp_path, *SLEEP)
    overrides = Overrides(launcher, unit)
    await change(unit, "CPUQuota=50%")
    await run("systemctl", "stop", unit.name)
    await unit.finished()
    assert await overrides.read() == {}
    await unit.reap()


async def test_more_than_the_new_limit_is_too_much(launcher: Launcher, tmp_path: Path) -> None:
    """The limit that ends a job is the one that is told."""
    unit = await started(launcher, tmp_path, PYTHON, "-c", GROWS)
    overrides = Overrides(launcher, unit)
    await until(lambda: (tmp_path / "out").read_bytes() != b"")
    await change(unit, "MemoryMax=200M")
    os.kill(unit.state.main_pid, signal.SIGUSR1)
    await unit.finished()
    assert await overrides.read() == {"memory_bytes": (500 * MIB, 200 * MIB)}
    assert judged(unit, 200, await unit.usage()) == (
        Reason.RESOURCE_ERROR,
        "memory limit of 200 MB exceeded",
    )
    await unit.reap()


async def test_a_limit_below_what_is_in_use(
    launcher: Launcher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """cgroup v2 ends the job. v1 refuses it and keeps the old limit, though systemd tells it."""
    unit = await started(launcher, tmp_path, PYTHON, "-c", GROWS)
    overrides = Overrides(launcher, unit)
    await until(lambda: (tmp_path / "out").read_bytes() != b"")
    await change(unit, "MemoryMax=50M")
    if V2:
        await unit.finished()
        assert await overrides.read() == {"memory_bytes": (500 * MIB, 50 * MIB)}
        assert judged(unit, 50, await unit.usage()) == (
            Reason.RESOURCE_ERROR,
            "memory limit of 50 MB exceeded",
        )
    else:
        assert await overrides.read() == {}
        assert "MemoryMax of 50 MB is not in force" in caplog.text
        assert in_force(unit).memory_bytes == 500 * MIB
        await unit.stop()
        assert await overrides.read() == {}
    await unit.reap()
