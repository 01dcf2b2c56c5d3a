"""Starting units: what fails, what is refused, and what was there before."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.bus.launching import ONE, connected, start_waiting
from worker.errors import PropertyRejected, SystemdError, UnitExists
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher
from worker.systemd.unit import Unit

if TYPE_CHECKING:
    from .conftest import Systemd


async def test_a_program_that_cannot_be_executed(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    starting = await start_waiting(systemd, launcher, launch)
    systemd.RunAndFinish(ONE, "failed", "exit-code", 1, 203)
    unit = await starting
    assert not unit.started
    assert (await unit.finished()).exec_main_status == 203
    await unit.reap()


async def test_a_start_job_that_failed_does_not_mean_the_program_did_not_run(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    starting = await start_waiting(systemd, launcher, launch)
    systemd.RunAndFinish(ONE, "failed", "exit-code", 1, 1)
    unit = await starting
    assert unit.started
    assert (await unit.finished()).exec_main_status == 1
    await unit.reap()


async def test_an_end_before_the_start_is_reported(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    starting = await start_waiting(systemd, launcher, launch)
    systemd.RunAndFinish(ONE, "done", "success", 1, 0)
    unit = await starting
    assert unit.started
    assert (await unit.finished()).result == "success"
    await unit.reap()


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


async def test_a_unit_not_reaped_is_not_started_again(
    launcher: Launcher, launch: Launch, unit: Unit
) -> None:
    with pytest.raises(UnitExists, match="not reaped"):
        await launcher.start(launch)
    await unit.reap()


async def test_a_start_without_an_answer_is_looked_for_and_adopted(
    systemd: Systemd, launch: Launch
) -> None:
    async with connected(call_timeout=0.5) as launcher:
        systemd.Hang(["StartTransientUnit", "started"])
        unit = await launcher.start(launch)
        assert unit.started
        assert len(systemd.Started()) == 1
        systemd.Finish(ONE, "exit-code", 1, 7)
        assert (await unit.finished()).exec_main_status == 7
        await unit.reap()


async def test_a_start_without_an_answer_nor_effect_is_tried_once_more(
    systemd: Systemd, launch: Launch
) -> None:
    async with connected(call_timeout=0.5) as launcher:
        systemd.Hang(["StartTransientUnit"])
        unit = await launcher.start(launch)
        assert len(systemd.Started()) == 2
        await unit.reap()


async def test_a_cancelled_start_leaves_nothing(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    starting = await start_waiting(systemd, launcher, launch)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await launcher.close()
    async with connected() as other:
        assert await other.leftovers() == []


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
