"""The launcher against a stand-in for systemd that can be unkind."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from worker.errors import BusGone, BusTimeout, PropertyRejected, SystemdError, UnitExists
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher

if TYPE_CHECKING:
    from .conftest import Systemd

ONE = "ffmpeg-job-one.service"


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
    ("version", "io", "peak"), [("252.38-1~deb12u1", None, None), ("257.1", 4096, 8192)]
)
async def test_what_systemd_counted(
    systemd: Systemd, launch: Launch, version: str, io: int | None, peak: int | None
) -> None:
    systemd.stop_systemd()
    systemd.start_systemd(version=version)
    launcher = Launcher()
    await launcher.connect()
    unit = await launcher.start(launch)
    systemd.Finish(ONE, "success", 1, 0)
    await unit.finished()
    usage = await unit.usage()
    assert usage.cpu_seconds == 1.5
    assert (usage.io_write_bytes, usage.memory_peak_bytes) == (io, peak)
    assert usage.io_read_bytes is None
    await unit.reap()
    await launcher.close()


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
    systemd: Systemd, launcher: Launcher, launch: Launch, result: str, code: int, status: int
) -> None:
    unit = await launcher.start(launch)
    systemd.Finish(ONE, result, code, status)
    state = await unit.finished()
    assert (state.result, state.exec_main_code, state.exec_main_status) == (result, code, status)
    assert (state.active_state, state.vanished) == ("failed", False)
    await unit.reap()
    assert unit.state == state
    assert await launcher.leftovers() == []


async def test_the_first_verdict_stands(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    unit = await launcher.start(launch)
    systemd.Finish(ONE, "exit-code", 1, 7)
    state = await unit.finished()
    systemd.Restart(ONE)
    await launcher.leftovers()  # an answer later than those signals
    assert unit.state == await unit.finished() == state
    await unit.reap()


async def test_a_program_that_cannot_be_executed(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    systemd.Automatic(False)
    starting = asyncio.create_task(launcher.start(launch))
    await _until(lambda: _armed(launcher))
    systemd.RunAndFinish(ONE, "failed", "exit-code", 1, 203)
    unit = await starting
    assert not unit.started
    assert (await unit.finished()).exec_main_status == 203
    await unit.reap()


async def test_a_start_job_that_failed_does_not_mean_the_program_did_not_run(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    systemd.Automatic(False)
    starting = asyncio.create_task(launcher.start(launch))
    await _until(lambda: _armed(launcher))
    systemd.RunAndFinish(ONE, "failed", "exit-code", 1, 1)
    unit = await starting
    assert unit.started
    assert (await unit.finished()).exec_main_status == 1
    await unit.reap()


async def test_an_end_before_the_start_is_reported(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    systemd.Automatic(False)
    starting = asyncio.create_task(launcher.start(launch))
    await _until(lambda: _armed(launcher))
    systemd.RunAndFinish(ONE, "done", "success", 1, 0)
    unit = await starting
    assert unit.started
    assert (await unit.finished()).result == "success"
    await unit.reap()


@pytest.mark.parametrize("silently", [False, True])
async def test_a_unit_stopped_by_somebody_else_is_no_success(
    systemd: Systemd, launcher: Launcher, launch: Launch, silently: bool
) -> None:
    unit = await launcher.start(launch)
    systemd.Vanish(ONE, silently)
    state = await unit.finished()
    assert state.vanished
    assert (state.exec_main_code, state.exec_main_status) == ((0, 0) if silently else (2, 15))
    await unit.reap()
    assert launcher.tracker.get(ONE) is None


async def test_stop_ends_a_running_unit(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    unit = await launcher.start(launch)
    await unit.stop()
    assert unit.state.finished
    assert (unit.state.exec_main_code, unit.state.exec_main_status) == (2, 15)
    await unit.stop()
    await unit.reap()
    assert await launcher.leftovers() == []


async def test_a_unit_that_cannot_be_stopped_is_given_up(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    unit = await launcher.start(launch)
    unit.launch = replace(launch, stop_timeout_sec=-0.92)  # gives up after 0.4 s
    systemd.Hang(["StopUnit"])
    with pytest.raises(SystemdError, match="stuck in I/O: see systemctl status"):
        await unit.stop()
    with pytest.raises(SystemdError, match="still loaded after"):
        await unit.reap()


async def test_a_daemon_reload_ends_nothing(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    unit = await launcher.start(launch)
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
    unit.launch = replace(launch, stop_timeout_sec=-0.92)  # gives up after 0.4 s
    systemd.Hang(["StopUnit"])
    reaping = asyncio.create_task(unit.reap())
    await _until(lambda: calls[-1] == "StopUnit")
    systemd.manager("Reload")
    with pytest.raises(SystemdError, match="still loaded after"):
        await reaping
    assert "GetUnit" in calls


async def test_a_counter_that_stays_unset_is_asked_for_once(
    systemd: Systemd, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemd.stop_systemd()
    systemd.start_systemd(version="257")
    launcher = Launcher()
    await launcher.connect()
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
    await launcher.close()


async def test_an_optional_property_is_dropped_once_and_remembered(
    systemd: Systemd, launcher: Launcher, launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    systemd.Unknown(["OOMPolicy", "CPUWeight"])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            unit = await launcher.start(launch)
            names = systemd.Properties(ONE)
            assert "ExecStart" in names
            assert not {"OOMPolicy", "CPUWeight"} & set(names)
            await unit.reap()
    warned = [record.getMessage() for record in caplog.records]
    assert len([text for text in warned if "OOMPolicy" in text and "252" in text]) == 1
    assert len(systemd.Started()) == 2 + 2


async def test_starts_at_once_all_do_without_the_property(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    systemd.Unknown(["OOMPolicy"])
    names = [f"ffmpeg-job-{i}.service" for i in range(10)]
    units = await asyncio.gather(*(launcher.start(replace(launch, unit=name)) for name in names))
    await asyncio.gather(*(unit.reap() for unit in units))


async def test_a_value_that_does_not_fit_is_refused(launcher: Launcher, launch: Launch) -> None:
    with pytest.raises(SystemdError, match="out of range"):
        await launcher.start(replace(launch, limits=UnitLimits(memory_bytes=2**64)))


async def test_a_limit_is_not_dropped(systemd: Systemd, launcher: Launcher, launch: Launch) -> None:
    systemd.Unknown(["MemoryMax"])
    with pytest.raises(PropertyRejected) as caught:
        await launcher.start(replace(launch, limits=UnitLimits(memory_bytes=1)))
    assert caught.value.property_name == "MemoryMax"
    assert launcher.tracker.get(ONE) is None
    unit = await launcher.start(launch)
    await unit.reap()


async def test_a_running_unit_is_neither_stopped_nor_started_twice(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    systemd.Load(ONE, "active", "running", 0, 0)
    with pytest.raises(UnitExists):
        await launcher.start(launch)
    assert await launcher.leftovers() == [ONE]
    await launcher.stop_and_reap(ONE)
    await launcher.stop_and_reap(ONE)
    assert await launcher.leftovers() == []


@pytest.mark.parametrize(
    ("active", "sub", "status"), [("failed", "failed", 1), ("active", "exited", 0)]
)
async def test_remains_are_cleared_away(
    systemd: Systemd, launcher: Launcher, launch: Launch, active: str, sub: str, status: int
) -> None:
    systemd.Load(ONE, active, sub, 1, status)
    unit = await launcher.start(launch)
    assert unit.started
    assert not unit.state.finished
    systemd.Finish(ONE, "success", 1, 0)
    assert (await unit.finished()).exec_main_status == 0
    await unit.reap()


async def test_a_unit_not_reaped_is_not_started_again(launcher: Launcher, launch: Launch) -> None:
    unit = await launcher.start(launch)
    with pytest.raises(UnitExists, match="not reaped"):
        await launcher.start(launch)
    await unit.reap()


async def test_a_start_without_an_answer_is_looked_for_and_adopted(
    systemd: Systemd, launch: Launch
) -> None:
    launcher = Launcher(call_timeout=0.5)
    await launcher.connect()
    systemd.Hang(["StartTransientUnit", "started"])
    unit = await launcher.start(launch)
    assert unit.started
    assert len(systemd.Started()) == 1
    systemd.Finish(ONE, "exit-code", 1, 7)
    assert (await unit.finished()).exec_main_status == 7
    await unit.reap()
    await launcher.close()


async def test_a_start_without_an_answer_nor_effect_is_tried_once_more(
    systemd: Systemd, launch: Launch
) -> None:
    launcher = Launcher(call_timeout=0.5)
    await launcher.connect()
    systemd.Hang(["StartTransientUnit"])
    unit = await launcher.start(launch)
    assert len(systemd.Started()) == 2
    await unit.reap()
    await launcher.close()


@pytest.mark.parametrize("loaded", [True, False])
async def test_a_bus_lost_during_a_start(
    systemd: Systemd, launcher: Launcher, launch: Launch, loaded: bool
) -> None:
    systemd.Hang(["StartTransientUnit"])
    starting = asyncio.create_task(launcher.start(launch))
    await _until(lambda: ONE in systemd.Started())
    systemd.stop_bus()
    systemd.start_bus()
    systemd.start_systemd()
    if loaded:
        systemd.Load(ONE, "active", "running", 0, 0)
    unit = await asyncio.wait_for(starting, 20)
    assert list(systemd.Started()) == ([] if loaded else [ONE])
    systemd.Finish(ONE, "exit-code", 1, 7)
    assert (await unit.finished()).exec_main_status == 7
    await unit.reap()


async def test_a_bus_that_stays_away_during_a_start(systemd: Systemd, launch: Launch) -> None:
    launcher = Launcher(reconnect_timeout=0.3)
    await launcher.connect()
    systemd.Hang(["StartTransientUnit"])
    starting = asyncio.create_task(launcher.start(launch))
    await _until(lambda: ONE in systemd.Started())
    systemd.stop_bus()
    with pytest.raises(BusGone):
        await starting
    await launcher.close()


async def test_a_start_given_up_is_ended_when_the_bus_is_back(
    systemd: Systemd, launch: Launch
) -> None:
    launcher = Launcher(reconnect_timeout=0.3)
    await launcher.connect()
    systemd.Hang(["StartTransientUnit"])
    starting = asyncio.create_task(launcher.start(launch))
    await _until(lambda: ONE in systemd.Started())
    systemd.stop_bus()
    with pytest.raises(BusGone, match="not known whether the unit was started"):
        await starting
    with pytest.raises(UnitExists, match="not reaped yet"):  # not to be ended in its place
        await launcher.start(launch)
    systemd.start_bus()
    systemd.start_systemd()
    systemd.Load(ONE, "active", "running", 0, 0)
    await _until(lambda: launcher.tracker.get(ONE) is None, 20)
    assert await launcher.leftovers() == []
    await launcher.close()


async def test_an_order_to_end_outlives_the_bus(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    """However long the bus is away: that time says nothing of the unit."""
    two = "ffmpeg-job-two.service"
    running = await launcher.start(launch)
    ended = await launcher.start(replace(launch, unit=two))
    for unit in (running, ended):
        unit.launch = replace(unit.launch, stop_timeout_sec=-0.92)  # gives up after 0.4 s
    systemd.Finish(two, "success", 1, 0)
    await ended.finished()
    systemd.stop_bus()
    await _until(lambda: not launcher.connected)
    orders = [asyncio.create_task(running.stop()), asyncio.create_task(ended.reap())]
    done, _pending = await asyncio.wait(orders, timeout=1)
    assert not done
    systemd.start_bus()
    systemd.start_systemd()
    systemd.Load(ONE, "active", "running", 0, 0)
    systemd.Load(two, "active", "exited", 1, 0)
    await asyncio.wait_for(asyncio.gather(*orders), 20)
    assert running.state.finished
    await running.reap()
    assert await launcher.leftovers() == []


async def test_closing_ends_an_order_that_waits_for_the_bus(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    unit = await launcher.start(launch)
    systemd.stop_bus()
    await _until(lambda: not launcher.connected)
    order = asyncio.create_task(unit.stop())
    await asyncio.sleep(0)
    await launcher.close()
    with pytest.raises(BusGone):
        await asyncio.wait_for(order, 5)


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


async def test_the_end_is_found_after_the_bus_was_restarted(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    unit = await launcher.start(launch)
    waiting = asyncio.create_task(unit.finished())
    systemd.stop_bus()
    await _until(lambda: not launcher.connected)
    started = time.monotonic()
    with pytest.raises(BusGone):
        await launcher.leftovers()
    assert time.monotonic() - started < 0.5
    systemd.start_bus()
    systemd.start_systemd()
    systemd.Load(ONE, "failed", "failed", 1, 7)
    state = await asyncio.wait_for(waiting, 20)
    assert (state.exec_main_status, state.vanished) == (7, False)
    await unit.reap()
    assert await launcher.leftovers() == []


async def test_a_unit_lost_with_the_bus_is_no_success(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    unit = await launcher.start(launch)
    systemd.stop_bus()
    systemd.start_bus()
    systemd.start_systemd()
    state = await asyncio.wait_for(unit.finished(), 20)
    assert state.vanished
    await unit.reap()


async def test_systemd_alone_goes_and_comes_back(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    unit = await launcher.start(launch)
    systemd.stop_systemd()
    systemd.start_systemd()
    # Announced by nobody: looked for because systemd's name on the bus has a new owner.
    state = await asyncio.wait_for(unit.finished(), 20)
    assert state.vanished
    await unit.reap()


async def test_a_cancelled_start_leaves_nothing(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    systemd.Automatic(False)
    starting = asyncio.create_task(launcher.start(launch))
    await _until(lambda: _armed(launcher))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await launcher.close()
    other = Launcher()
    await other.connect()
    assert await other.leftovers() == []
    await other.close()


async def test_many_starts_at_once(launcher: Launcher, launch: Launch) -> None:
    names = [f"ffmpeg-job-{i}.service" for i in range(250)]
    argv = ("/usr/bin/true", "x" * 4000)
    units = await asyncio.gather(
        *(launcher.start(replace(launch, unit=name, argv=argv)) for name in names)
    )
    assert all(unit.started for unit in units)
    assert len(await launcher.leftovers()) == 250
    await asyncio.gather(*(unit.reap() for unit in units))
    assert await launcher.leftovers() == []


async def test_closing_wakes_those_who_wait(launcher: Launcher, launch: Launch) -> None:
    unit = await launcher.start(launch)
    waiting = asyncio.create_task(unit.finished())
    await asyncio.sleep(0)
    await launcher.close()
    with pytest.raises(BusGone, match="closed before the unit ended"):
        await waiting


async def test_no_bus_names_the_address_and_can_be_tried_again(systemd: Systemd) -> None:
    systemd.stop_bus()
    launcher = Launcher()
    with pytest.raises(SystemdError, match=systemd.address):
        await launcher.connect()
    systemd.start_bus()
    with pytest.raises(SystemdError):
        await launcher.connect()  # the bus is there, systemd is not
    systemd.start_systemd()
    await launcher.connect()
    assert launcher.connected
    await launcher.close()
    assert not launcher.connected


async def test_a_call_without_an_answer_ends(systemd: Systemd) -> None:
    launcher = Launcher()
    await launcher.connect()
    systemd.Hang(["StartTransientUnit"])
    with pytest.raises(BusTimeout, match=r"did not answer StartTransientUnit within 0\.2 s"):
        await launcher.bus.call(
            "StartTransientUnit", "ssa(sv)a(sa(sv))", ["x.service", "fail", [], []], timeout=0.2
        )
    await launcher.close()


def _armed(launcher: Launcher) -> bool:
    unit = launcher.tracker.get(ONE)
    return unit is not None and unit.armed


async def _until(condition: Callable[[], bool], timeout: float = 10) -> None:
    """Wait for something that has no event of its own."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)
