"""Units of an agent that is gone, in the hands of the next: followed, paused, ended, reaped."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.slowness import SLOWNESS
from tests.system.commands import run, until
from worker.errors import UnitExists
from worker.systemd.adoption import adopt
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher
from worker.systemd.suspend import SYSTEM_FOLDER, Suspension
from worker.systemd.unit import Unit

MANY = 100
PACE = max(1.0, SLOWNESS / 5)
"""How long a second is where pauses and time limits are measured."""
SLEEP = ("/bin/sleep", "3600")
TWO_SECONDS = ("/bin/sh", "-c", f"for i in $(seq 20); do sleep {PACE / 10}; done")


def drop_ins() -> list[Path]:
    return list(SYSTEM_FOLDER.glob("ffmpeg-job-*.d"))


@contextlib.asynccontextmanager
async def an_agent() -> AsyncIterator[Launcher]:
    launcher = Launcher()
    await launcher.connect()
    try:
        yield launcher
    finally:
        await launcher.close()


@pytest.fixture
async def launcher() -> AsyncIterator[Launcher]:
    """The next agent's; when the test is over no unit and no drop-in of a job is left."""
    async with an_agent() as launcher:
        yield launcher
        left = await launcher.leftovers()
        for name in left:  # a test that failed does not spoil the next
            await launcher.stop_and_reap(name)
        files = drop_ins()
        Suspension(launcher).sweep([])
        assert (left, files) == ([], [])


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., Launch]:
    def launch(*argv: str, job: str = "one", **limits: Any) -> Launch:
        return Launch(
            unit=f"ffmpeg-job-{job}.service",
            description="a job of an agent that is gone",
            argv=argv,
            slice="ffmpeg-default.slice",
            limits=UnitLimits(**limits),
            stdout=tmp_path / f"{job}.out",
            stop_timeout_sec=2 * SLOWNESS,
        )

    return launch


async def left_running(*launches: Launch) -> None:
    """Start units and go away."""
    async with an_agent() as launcher:
        await asyncio.gather(*(launcher.start(launch) for launch in launches))


async def adopted(launcher: Launcher, launch: Launch) -> Unit:
    unit = await adopt(launcher, launch)
    assert unit is not None
    return unit


async def test_a_running_unit(launcher: Launcher, launch: Callable[..., Launch]) -> None:
    one = launch("/bin/sh", "-c", "sleep 1; exit 7")
    await left_running(one)
    unit = await adopted(launcher, one)
    assert unit.started
    assert unit.state.main_pid == int(await run("systemctl", "show", "-P", "MainPID", one.unit))
    assert unit.sample().memory_peak_bytes
    with pytest.raises(UnitExists):
        await adopt(launcher, one)
    state = await unit.finished()
    assert (state.active_state, state.result, state.exec_main_status) == ("failed", "exit-code", 7)
    assert state.wall_seconds == pytest.approx(1, abs=0.5 * SLOWNESS)
    assert (await unit.usage()).cpu_seconds
    await unit.reap()
    assert await adopt(launcher, one) is None


@pytest.mark.parametrize(
    ("program", "started", "code", "status"),
    [
        ("/bin/true", True, 1, 0),
        ("/bin/false", True, 1, 1),
        ("/nonexistent", False, 1, 203),
    ],
)
async def test_a_unit_that_ended_meanwhile(
    launcher: Launcher,
    launch: Callable[..., Launch],
    program: str,
    started: bool,
    code: int,
    status: int,
) -> None:
    one = launch(program)
    await left_running(one)
    await until(lambda: _ended(one))
    unit = await adopted(launcher, one)
    assert unit.started == started
    state = await unit.finished()
    assert (state.exec_main_code, state.exec_main_status) == (code, status)
    assert not state.vanished
    await unit.reap()


async def _ended(launch: Launch) -> bool:
    return await run("systemctl", "show", "-P", "SubState", launch.unit) in ("exited", "failed")


async def test_a_unit_on_its_way_down(launcher: Launcher, launch: Callable[..., Launch]) -> None:
    one = launch("/bin/sh", "-c", "trap 'sleep 1; exit 5' TERM; echo; while :; do sleep 0.1; done")
    await left_running(one)
    await until(lambda: one.stdout.stat().st_size > 0)
    await run("systemctl", "stop", "--no-block", one.unit)
    unit = await adopted(launcher, one)
    assert not unit.state.finished
    await unit.stop()
    assert (await unit.finished()).exec_main_status == 5
    await unit.reap()


async def test_a_stop(launcher: Launcher, launch: Callable[..., Launch]) -> None:
    await left_running(one := launch(*SLEEP))
    unit = await adopted(launcher, one)
    await unit.stop()
    assert (await unit.finished()).vanished
    await unit.reap()


async def test_no_end_is_missed(launcher: Launcher, launch: Callable[..., Launch]) -> None:
    """Programs that end before, while and after they are taken over."""
    launches = [
        launch("/bin/sh", "-c", f"sleep 0.{i:02}; exit {i}", job=f"end-{i}") for i in range(60)
    ]
    await left_running(*launches)
    units = await asyncio.gather(*(adopted(launcher, one) for one in launches))
    async with asyncio.timeout(20 * SLOWNESS):
        states = await asyncio.gather(*(unit.finished() for unit in units))
    assert [state.exec_main_status for state in states] == list(range(60))
    await asyncio.gather(*(unit.reap() for unit in units))


async def test_the_bus_goes_meanwhile(launcher: Launcher, launch: Callable[..., Launch]) -> None:
    launches = [launch("/bin/sh", "-c", "sleep 1; exit 3", job=f"bus-{i}") for i in range(40)]
    await left_running(*launches)
    taking = asyncio.gather(*(adopted(launcher, one) for one in launches))
    await asyncio.sleep(0)
    await run("systemctl", "kill", "--signal=KILL", "dbus.service")
    async with asyncio.timeout(30 * SLOWNESS):
        units = await taking
        states = await asyncio.gather(*(unit.finished() for unit in units))
    assert {state.exec_main_status for state in states} == {3}
    await asyncio.gather(*(unit.reap() for unit in units))


async def test_a_hundred_units_within_a_second(
    launcher: Launcher, launch: Callable[..., Launch]
) -> None:
    launches = [launch(*SLEEP, job=f"many-{i}") for i in range(MANY)]
    await left_running(*launches)
    begun = time.monotonic()
    assert len(await launcher.leftovers()) == MANY
    units = await asyncio.gather(*(adopted(launcher, one) for one in launches))
    took = time.monotonic() - begun
    assert all(unit.started and unit.state.main_pid for unit in units)
    print(f"{MANY} units taken over in {took:.3f} s")
    assert took < 1 * SLOWNESS
    await asyncio.gather(*(unit.stop() for unit in units))
    await asyncio.gather(*(unit.reap() for unit in units))


async def test_a_pause_does_not_count(launcher: Launcher, launch: Callable[..., Launch]) -> None:
    """Two seconds of work under a limit of three, with a pause of four in the middle."""
    unit = await launcher.start(launch(*TWO_SECONDS, runtime_sec=3 * PACE))
    suspension = Suspension(launcher)
    await suspension.resume(unit)  # never paused
    await asyncio.sleep(0.5 * PACE)
    await suspension.pause(unit)
    await suspension.pause(unit)
    assert suspension.paused(unit)
    assert _processes(unit) == {"T"}
    await asyncio.sleep(4 * PACE)
    assert not unit.state.finished
    await suspension.resume(unit)
    await suspension.resume(unit)
    assert not suspension.paused(unit)
    state = await unit.finished()
    assert (state.result, state.exec_main_status) == ("success", 0)
    assert state.wall_seconds is not None
    assert state.wall_seconds > 5.5 * PACE
    assert 0 <= suspension.paused_seconds(unit) - 4 * PACE < 0.5 * SLOWNESS
    await unit.reap()
    await suspension.forget(unit)


def _processes(unit: Unit) -> set[str]:
    """States of the unit's processes, proc(5)."""
    (folder, *_) = Path("/sys/fs/cgroup").glob(f"**/{unit.name}")
    pids = (folder / "cgroup.procs").read_text().split()
    return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids}


async def test_the_limit_holds_after_two_pauses(
    launcher: Launcher, launch: Callable[..., Launch]
) -> None:
    unit = await launcher.start(launch(*SLEEP, runtime_sec=2 * PACE))
    suspension = Suspension(launcher)
    for _ in range(2):
        await suspension.pause(unit)
        await asyncio.sleep(2 * PACE)
        await suspension.resume(unit)
    await _worked_until_its_limit(unit, suspension, paused=4 * PACE, limit=2 * PACE)


async def test_a_pause_outlives_the_agent(
    launcher: Launcher, launch: Callable[..., Launch]
) -> None:
    one = launch(*SLEEP, runtime_sec=2 * PACE)
    async with an_agent() as earlier:
        await Suspension(earlier).pause(await earlier.start(one))
    await asyncio.sleep(3 * PACE)
    unit = await adopted(launcher, one)
    suspension = Suspension(launcher)
    assert suspension.paused(unit)
    assert not unit.state.finished
    await suspension.resume(unit)
    await _worked_until_its_limit(unit, suspension, paused=3 * PACE, limit=2 * PACE)


async def _worked_until_its_limit(
    unit: Unit, suspension: Suspension, *, paused: float, limit: float
) -> None:
    """A unit that goes on after its last pause is ended by its limit, which no pause counts for."""
    told = suspension.paused_seconds(unit)
    assert 0 <= told - paused < 0.5 * SLOWNESS
    state = await unit.finished()
    assert state.result == "timeout"
    assert state.wall_seconds is not None
    assert -0.1 < state.wall_seconds - told - limit < 0.3 * SLOWNESS
    await unit.reap()


async def test_a_paused_unit_is_stopped_at_once(
    launcher: Launcher, launch: Callable[..., Launch]
) -> None:
    unit = await launcher.start(launch(*SLEEP, runtime_sec=600))
    await Suspension(launcher).pause(unit)
    begun = time.monotonic()
    await unit.stop()
    assert time.monotonic() - begun < 1 * SLOWNESS
    await unit.reap()  # and systemd has removed the drop-in


async def test_pauses_share_reloads(launcher: Launcher, launch: Callable[..., Launch]) -> None:
    units = await asyncio.gather(
        *(launcher.start(launch(*SLEEP, job=f"pause-{i}", runtime_sec=600)) for i in range(20))
    )
    suspension = Suspension(launcher)
    before = await _reloads()
    await asyncio.gather(*(suspension.pause(unit) for unit in units))
    assert await _reloads() - before <= 3
    limits = [await run("systemctl", "show", "-P", "RuntimeMaxUSec", u.name) for u in units]
    assert set(limits) == {"infinity"}
    await asyncio.gather(*(unit.reap() for unit in units))


async def _reloads() -> int:
    await run("journalctl", "--sync")
    lines = await run("journalctl", "--no-pager", "-q", "_PID=1", "--output=cat")
    # systemd 257 says "Reloading finished in …" as well
    return [line.rstrip(".") for line in lines.splitlines()].count("Reloading")


async def test_nothing_is_left_of_a_pause(
    launcher: Launcher, launch: Callable[..., Launch]
) -> None:
    """Without a time limit there is no reload, so systemd knows of no drop-in to remove."""
    one = launch(*SLEEP)
    suspension = Suspension(launcher)
    for clean_up in (suspension.forget, _swept_by(suspension, launcher)):
        unit = await launcher.start(one)
        await suspension.pause(unit)
        suspension.sweep(await launcher.leftovers())
        assert len(drop_ins()) == 1
        await unit.reap()
        assert len(drop_ins()) == 1
        await clean_up(unit)
        assert drop_ins() == []


def _swept_by(suspension: Suspension, launcher: Launcher) -> Callable[[Unit], Awaitable[None]]:
    async def sweep(_unit: Unit) -> None:
        suspension.sweep(await launcher.leftovers())

    return sweep
