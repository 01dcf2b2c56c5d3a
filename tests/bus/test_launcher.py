"""The launcher against a stand-in for systemd that can be unkind: the life of a unit."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.bus.launching import ONE, connected, hurry, until
from worker.errors import SystemdError
from worker.systemd.launch import Launch
from worker.systemd.launcher import Launcher
from worker.systemd.unit import Unit

if TYPE_CHECKING:
    from .conftest import Systemd


async def test_a_unit_runs_ends_well_and_is_reaped(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    assert launcher.version == 252
    unit = await launcher.start(launch)
    assert unit.started
    assert unit.state.main_pid == 4194305
    assert unit.state.control_group == f"/ffmpeg.slice/ffmpeg-default.slice/{ONE}"
    assert not unit.state.finished
    systemd.Finish(ONE, "success", 1, 0)
    state = await unit.finished()
    assert (state.result, state.exec_main_code, state.exec_main_status) == ("success", 1, 0)
    assert state.wall_seconds is not None
    assert not state.vanished
    await unit.reap()
    await unit.reap()
    assert await launcher.leftovers() == []
    again = await launcher.start(launch)
    await again.reap()
    assert await launcher.leftovers() == []


@pytest.mark.parametrize(
    ("result", "code", "status"),
    [
        ("exit-code", 1, 1),
        ("exit-code", 1, 255),
        ("oom-kill", 2, 9),
        ("signal", 2, 9),
        ("timeout", 2, 15),
        ("core-dump", 3, 25),
    ],
)
async def test_failures_are_told_and_the_verdict_stays(
    systemd: Systemd, launcher: Launcher, unit: Unit, result: str, code: int, status: int
) -> None:
    systemd.Finish(ONE, result, code, status)
    state = await unit.finished()
    assert (state.result, state.exec_main_code, state.exec_main_status) == (result, code, status)
    assert (state.active_state, state.vanished) == ("failed", False)
    await unit.reap()
    assert unit.state == state
    assert await launcher.leftovers() == []


async def test_the_first_verdict_stands(systemd: Systemd, launcher: Launcher, unit: Unit) -> None:
    systemd.Finish(ONE, "exit-code", 1, 7)
    state = await unit.finished()
    systemd.Restart(ONE)
    await launcher.leftovers()  # an answer later than those signals
    assert unit.state == await unit.finished() == state
    await unit.reap()


@pytest.mark.parametrize("silently", [False, True])
async def test_a_unit_stopped_by_somebody_else_is_no_success(
    systemd: Systemd, launcher: Launcher, unit: Unit, silently: bool
) -> None:
    systemd.Vanish(ONE, silently)
    state = await unit.finished()
    assert state.vanished
    assert (state.exec_main_code, state.exec_main_status) == ((0, 0) if silently else (2, 15))
    await unit.reap()
    assert launcher.tracker.get(ONE) is None


async def test_stop_ends_a_running_unit(systemd: Systemd, launcher: Launcher, unit: Unit) -> None:
    await unit.stop()
    assert unit.state.finished
    assert (unit.state.exec_main_code, unit.state.exec_main_status) == (2, 15)
    await unit.stop()
    await unit.reap()
    assert await launcher.leftovers() == []


async def test_a_unit_that_cannot_be_stopped_is_given_up(
    systemd: Systemd, launcher: Launcher, unit: Unit
) -> None:
    hurry(unit)
    systemd.Hang(["StopUnit"])
    with pytest.raises(SystemdError, match="stuck in I/O: see systemctl status"):
        await unit.stop()
    with pytest.raises(SystemdError, match="still loaded after"):
        await unit.reap()


async def test_a_daemon_reload_ends_nothing(
    systemd: Systemd, launcher: Launcher, unit: Unit
) -> None:
    systemd.manager("Reload")
    await launcher.leftovers()  # an answer later than those signals
    await asyncio.sleep(0)
    assert not unit.state.finished
    systemd.Finish(ONE, "success", 1, 0)
    assert not (await unit.finished()).vanished
    await unit.reap()


async def test_what_systemd_said_is_not_asked_for(
    systemd: Systemd, launcher: Launcher, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit takes as few calls as can be; only during a reload its removal is in doubt."""
    calls: list[str] = []
    call = launcher.bus.call

    async def spy(member: str, *args: Any, **options: Any) -> list[object]:
        calls.append(member)
        return await call(member, *args, **options)

    monkeypatch.setattr(launcher.bus, "call", spy)
    unit = await launcher.start(launch)
    systemd.Finish(ONE, "success", 1, 0)
    await unit.finished()
    await unit.reap()
    assert calls == ["StartTransientUnit", "ListUnitsByNames", "StopUnit"]
    unit = await launcher.start(launch)
    hurry(unit)
    systemd.Hang(["StopUnit"])
    reaping = asyncio.create_task(unit.reap())
    await until(lambda: calls[-1] == "StopUnit")
    systemd.manager("Reload")
    with pytest.raises(SystemdError, match="still loaded after"):
        await reaping
    assert "GetUnit" in calls


@pytest.mark.parametrize(
    ("version", "io", "peak"), [("252.38-1~deb12u1", None, None), ("257.1", 4096, 8192)]
)
async def test_what_systemd_counted(
    systemd: Systemd, launch: Launch, version: str, io: int | None, peak: int | None
) -> None:
    systemd.stop_systemd()
    systemd.start_systemd(version=version)
    async with connected() as launcher:
        unit = await launcher.start(launch)
        systemd.Finish(ONE, "success", 1, 0)
        await unit.finished()
        usage = await unit.usage()
        assert usage.cpu_seconds == 1.5
        assert (usage.io_write_bytes, usage.memory_peak_bytes) == (io, peak)
        assert usage.io_read_bytes is None
        await unit.reap()


async def test_a_counter_that_stays_unset_is_asked_for_once(
    systemd: Systemd, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemd.stop_systemd()
    systemd.start_systemd(version="257")
    async with connected() as launcher:
        get = launcher.bus.get
        asked: list[str] = []

        async def spy(path: str, interface: str, name: str) -> object:
            asked.append(name)
            return await get(path, interface, name)

        monkeypatch.setattr(launcher.bus, "get", spy)
        everything = ["CPUUsageNSec", "MemoryPeak", "IOReadBytes", "IOWriteBytes"]
        counted = ["CPUUsageNSec", "MemoryPeak", "IOWriteBytes"]
        # A unit that failed may have had no cgroup: that says nothing of the next one.
        for result, status, expected in (
            ("exit-code", 1, everything), ("success", 0, everything), ("success", 0, counted),
        ):  # fmt: skip
            asked.clear()
            unit = await launcher.start(launch)
            systemd.Finish(ONE, result, 1, status)
            await unit.finished()
            assert (await unit.usage()).io_write_bytes == 4096
            assert asked == expected
            await unit.reap()


async def test_a_usage_record_of_an_earlier_unit_is_not_read(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    path = launcher.meter.record_files(launcher.control_group(launch))[0]
    record = path + ":oom_kill {}\n"
    launch.stdout.write_text(record.format(16))
    unit = await launcher.start(launch)
    with launch.stdout.open("a") as file:
        file.write(record.format(2))
    systemd.Finish(ONE, "exit-code", 1, 1)
    await unit.finished()
    assert (await unit.usage()).oom_kills == 2
    await unit.reap()
