"""Units of a launcher whose bus goes, stays away and comes back, or that is closed."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.bus.launching import ONE, connected, hurry, start_unanswered, until
from worker.errors import BusGone, BusTimeout, SystemdError, UnitExists
from worker.systemd.launch import Launch
from worker.systemd.launcher import Launcher
from worker.systemd.unit import Unit

if TYPE_CHECKING:
    from .conftest import Systemd


@pytest.mark.parametrize("loaded", [True, False])
async def test_a_bus_lost_during_a_start(
    systemd: Systemd, launcher: Launcher, launch: Launch, loaded: bool
) -> None:
    starting = await start_unanswered(systemd, launcher, launch)
    systemd.stop_bus()
    systemd.start()
    if loaded:
        systemd.Load(ONE, "active", "running", 0, 0)
    unit = await asyncio.wait_for(starting, 20)
    assert list(systemd.Started()) == ([] if loaded else [ONE])
    systemd.Finish(ONE, "exit-code", 1, 7)
    assert (await unit.finished()).exec_main_status == 7
    await unit.reap()


async def test_a_bus_that_stays_away_during_a_start(systemd: Systemd, launch: Launch) -> None:
    async with connected(reconnect_timeout=0.3) as launcher:
        starting = await start_unanswered(systemd, launcher, launch)
        systemd.stop_bus()
        with pytest.raises(BusGone):
            await starting


async def test_a_start_given_up_is_ended_when_the_bus_is_back(
    systemd: Systemd, launch: Launch
) -> None:
    async with connected(reconnect_timeout=0.3) as launcher:
        starting = await start_unanswered(systemd, launcher, launch)
        systemd.stop_bus()
        with pytest.raises(BusGone, match="not known whether the unit was started"):
            await starting
        with pytest.raises(UnitExists, match="not reaped yet"):  # not to be ended in its place
            await launcher.start(launch)
        systemd.start()
        systemd.Load(ONE, "active", "running", 0, 0)
        await until(lambda: launcher.tracker.get(ONE) is None, 20)
        assert await launcher.leftovers() == []


async def test_an_order_to_end_outlives_the_bus(
    systemd: Systemd, launcher: Launcher, launch: Launch
) -> None:
    """However long the bus is away: that time says nothing of the unit."""
    two = "ffmpeg-job-two.service"
    running = await launcher.start(launch)
    ended = await launcher.start(replace(launch, unit=two))
    for unit in (running, ended):
        hurry(unit)
    systemd.Finish(two, "success", 1, 0)
    await ended.finished()
    systemd.stop_bus()
    await until(lambda: not launcher.connected)
    orders = [asyncio.create_task(running.stop()), asyncio.create_task(ended.reap())]
    done, _pending = await asyncio.wait(orders, timeout=1)
    assert not done
    systemd.start()
    systemd.Load(ONE, "active", "running", 0, 0)
    systemd.Load(two, "active", "exited", 1, 0)
    await asyncio.wait_for(asyncio.gather(*orders), 20)
    assert running.state.finished
    await running.reap()
    assert await launcher.leftovers() == []


async def test_closing_ends_an_order_that_waits_for_the_bus(
    systemd: Systemd, launcher: Launcher, unit: Unit
) -> None:
    systemd.stop_bus()
    await until(lambda: not launcher.connected)
    order = asyncio.create_task(unit.stop())
    await asyncio.sleep(0)
    await launcher.close()
    with pytest.raises(BusGone):
        await asyncio.wait_for(order, 5)


async def test_the_end_is_found_after_the_bus_was_restarted(
    systemd: Systemd, launcher: Launcher, unit: Unit
) -> None:
    waiting = asyncio.create_task(unit.finished())
    systemd.stop_bus()
    await until(lambda: not launcher.connected)
    started = time.monotonic()
    with pytest.raises(BusGone):
        await launcher.leftovers()
    assert time.monotonic() - started < 0.5
    systemd.start()
    systemd.Load(ONE, "failed", "failed", 1, 7)
    state = await asyncio.wait_for(waiting, 20)
    assert (state.exec_main_status, state.vanished) == (7, False)
    await unit.reap()
    assert await launcher.leftovers() == []


async def test_a_unit_lost_with_the_bus_is_no_success(
    systemd: Systemd, launcher: Launcher, unit: Unit
) -> None:
    systemd.stop_bus()
    systemd.start()
    state = await asyncio.wait_for(unit.finished(), 20)
    assert state.vanished
    await unit.reap()


async def test_systemd_alone_goes_and_comes_back(
    systemd: Systemd, launcher: Launcher, unit: Unit
) -> None:
    systemd.stop_systemd()
    systemd.start_systemd()
    # Announced by nobody: looked for because systemd's name on the bus has a new owner.
    state = await asyncio.wait_for(unit.finished(), 20)
    assert state.vanished
    await unit.reap()


async def test_closing_wakes_those_who_wait(launcher: Launcher, unit: Unit) -> None:
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
    async with connected() as launcher:
        systemd.Hang(["StartTransientUnit"])
        with pytest.raises(BusTimeout, match=r"did not answer StartTransientUnit within 0\.2 s"):
            await launcher.bus.call(
                "StartTransientUnit", "ssa(sv)a(sa(sv))", ["x.service", "fail", [], []], timeout=0.2
            )
