"""Taking over units, against a stand-in for systemd in which anything happens at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import pytest

from tests.bus.launching import ONE, armed, connected, until
from worker.errors import BusGone, UnitExists
from worker.systemd.adoption import adopt
from worker.systemd.launch import Launch
from worker.systemd.launcher import Launcher
from worker.systemd.unit import Unit

if TYPE_CHECKING:
    from .conftest import Systemd

WhenRead = Callable[..., None]


@pytest.fixture
async def earlier(systemd: Systemd) -> AsyncIterator[Launcher]:
    """The launcher of an earlier agent."""
    async with connected() as launcher:
        yield launcher


async def _adopted(launcher: Launcher, launch: Launch) -> Unit:
    async with asyncio.timeout(20):
        unit = await adopt(launcher, launch)
    assert unit is not None
    return unit


async def _end(unit: Unit) -> tuple[str, int, int]:
    async with asyncio.timeout(20):
        state = await unit.finished()
    return state.result, state.exec_main_code, state.exec_main_status


@pytest.fixture
def when_read(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> WhenRead:
    """Have something happen just before the first property is read, or just after."""

    def when_read(event: Callable[[], object], *, late: bool) -> None:
        read, events, turn = launcher.read, [event], asyncio.Lock()

        async def reading(path: str, interface: str, name: str) -> object:
            async with turn:
                if events and not late:
                    await asyncio.to_thread(events.pop())
                value = await read(path, interface, name)
                if events:
                    await asyncio.to_thread(events.pop())
                return value

        monkeypatch.setattr(launcher, "read", reading)

    return when_read


async def test_a_running_unit_is_followed_to_its_end(
    systemd: Systemd, earlier: Launcher, launcher: Launcher, launch: Launch
) -> None:
    await earlier.start(launch)
    assert await launcher.leftovers() == [ONE]
    unit = await _adopted(launcher, launch)
    assert unit.started
    assert unit.state.main_pid == 4194305
    assert unit.state.control_group == f"/ffmpeg.slice/{ONE}"
    assert not unit.state.finished
    with pytest.raises(UnitExists, match="in the hands of this agent"):
        await adopt(launcher, launch)
    systemd.Finish(ONE, "exit-code", 1, 7)
    assert await _end(unit) == ("exit-code", 1, 7)
    assert (await unit.usage()).cpu_seconds == 1.5
    await unit.reap()
    assert await launcher.leftovers() == []
    assert systemd.Started() == [ONE]


async def test_a_stop_of_a_running_unit(
    systemd: Systemd, earlier: Launcher, launcher: Launcher, launch: Launch
) -> None:
    await earlier.start(launch)
    unit = await _adopted(launcher, launch)
    await unit.stop()
    assert unit.state.exec_main_status == 15
    await unit.reap()
    assert systemd.Started() == [ONE]


@pytest.mark.parametrize(
    ("active", "sub", "code", "status"),
    [("active", "exited", 1, 0), ("failed", "failed", 1, 7), ("failed", "failed", 1, 203)],
)
async def test_what_ended_before(
    systemd: Systemd,
    launcher: Launcher,
    launch: Launch,
    active: str,
    sub: str,
    code: int,
    status: int,
) -> None:
    systemd.Load(ONE, active, sub, code, status)
    unit = await _adopted(launcher, launch)
    assert unit.state.exec_main_status == status
    assert await _end(unit) == ("exit-code" if status else "success", code, status)
    assert not unit.state.vanished
    await unit.reap()
    assert await launcher.leftovers() == []


async def test_no_such_unit(launcher: Launcher, launch: Launch) -> None:
    assert await adopt(launcher, launch) is None
    assert launcher.tracker.get(ONE) is None


async def _pending(systemd: Systemd, earlier: Launcher, launch: Launch) -> asyncio.Task[Unit]:
    """A unit whose start job waits."""
    systemd.Automatic(False)
    starting = asyncio.create_task(earlier.start(launch))
    async with asyncio.timeout(10):
        while not await earlier.leftovers():
            await asyncio.sleep(0.01)
    return starting


async def _taking(launcher: Launcher, launch: Launch) -> asyncio.Task[Unit | None]:
    """An adoption that waits for the start job."""
    taking = asyncio.create_task(adopt(launcher, launch))
    await until(lambda: armed(launcher))
    await launcher.leftovers()
    assert not taking.done()
    return taking


async def test_a_start_under_way_is_waited_for(
    systemd: Systemd, earlier: Launcher, launcher: Launcher, launch: Launch
) -> None:
    starting = await _pending(systemd, earlier, launch)
    taking = await _taking(launcher, launch)
    systemd.Run(ONE)
    unit = await asyncio.wait_for(taking, 10)
    assert unit is not None
    assert unit.started
    assert unit.state.main_pid == 4194305
    systemd.Finish(ONE, "success", 1, 0)
    assert await _end(unit) == ("success", 1, 0)
    await starting
    await unit.reap()
    assert systemd.Started() == [ONE]


@pytest.mark.parametrize(("status", "started"), [(203, False), (1, True)])
async def test_a_start_that_fails_under_our_eyes(
    systemd: Systemd,
    earlier: Launcher,
    launcher: Launcher,
    launch: Launch,
    status: int,
    started: bool,
) -> None:
    starting = await _pending(systemd, earlier, launch)
    taking = await _taking(launcher, launch)
    systemd.RunAndFinish(ONE, "failed", "exit-code", 1, status)
    unit = await asyncio.wait_for(taking, 10)
    assert unit is not None
    assert await _end(unit) == ("exit-code", 1, status)
    assert unit.started == started
    await starting
    await unit.reap()


async def test_giving_up_leaves_the_unit_alone(
    systemd: Systemd, earlier: Launcher, launcher: Launcher, launch: Launch
) -> None:
    starting = await _pending(systemd, earlier, launch)
    taking = await _taking(launcher, launch)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert launcher.tracker.get(ONE) is None
    taking = await _taking(launcher, launch)
    await launcher.close()
    with pytest.raises(BusGone):
        await taking
    systemd.Run(ONE)
    unit = await starting
    assert not unit.state.finished
    await unit.reap()


@pytest.mark.parametrize("late", [False, True])
async def test_an_end_while_it_is_looked_at(
    systemd: Systemd,
    earlier: Launcher,
    launcher: Launcher,
    launch: Launch,
    when_read: WhenRead,
    late: bool,
) -> None:
    await earlier.start(launch)
    when_read(lambda: systemd.Finish(ONE, "exit-code", 1, 9), late=late)
    unit = await _adopted(launcher, launch)
    assert await _end(unit) == ("exit-code", 1, 9)
    assert unit.started
    await unit.reap()


@pytest.mark.parametrize("silently", [False, True])
@pytest.mark.parametrize("late", [False, True])
async def test_a_unit_that_vanishes_while_it_is_looked_at(
    systemd: Systemd,
    earlier: Launcher,
    launcher: Launcher,
    launch: Launch,
    when_read: WhenRead,
    late: bool,
    silently: bool,
) -> None:
    systemd.Load(ONE, "active", "running", 0, 0)
    when_read(lambda: systemd.Vanish(ONE, silently), late=late)
    unit = await _adopted(launcher, launch)
    end = await _end(unit)
    assert unit.state.vanished
    if not silently:
        assert end == ("success", 2, 15)
    await unit.reap()


@pytest.mark.parametrize("late", [False, True])
async def test_the_bus_goes_while_it_is_looked_at(
    systemd: Systemd, launcher: Launcher, launch: Launch, when_read: WhenRead, late: bool
) -> None:
    """And the program ends before the bus is back."""

    def lose() -> None:
        systemd.stop_bus()
        systemd.start()
        systemd.Load(ONE, "failed", "failed", 1, 7)

    systemd.Load(ONE, "active", "running", 0, 0)
    when_read(lose, late=late)
    unit = await _adopted(launcher, launch)
    assert await _end(unit) == ("exit-code", 1, 7)
    await unit.reap()
    assert await launcher.leftovers() == []
