"""The launcher on a real systemd where others interfere: with its units, its slices or its bus."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.system.commands import run
from tests.system.launching import SLEEP, Jobs
from worker.errors import SystemdError, UnitExists
from worker.systemd.launcher import Launcher
from worker.systemd.unit import Unit


async def test_a_slice_stopped_by_somebody_else(launcher: Launcher, jobs: Jobs) -> None:
    units = [await launcher.start(jobs.launch(*SLEEP, job=q, queue=q)) for q in ("live", "batch")]
    await run("systemctl", "stop", "ffmpeg.slice")
    for unit in units:
        assert (await unit.finished()).vanished
        await unit.reap()


async def test_a_masked_slice(launcher: Launcher, jobs: Jobs) -> None:
    mask = Path("/run/systemd/system/ffmpeg-masked.slice")
    mask.parent.mkdir(parents=True, exist_ok=True)
    mask.symlink_to("/dev/null")
    launch = replace(jobs.launch("/bin/true"), slice=mask.name)
    await run("systemctl", "daemon-reload")
    with pytest.raises(SystemdError, match="masked"):
        await launcher.start(launch)
    mask.unlink()
    await run("systemctl", "daemon-reload")
    unit = await launcher.start(launch)
    assert (await unit.finished()).result == "success"
    await unit.reap()


async def test_a_unit_file_of_that_name(launcher: Launcher, jobs: Jobs) -> None:
    launch = jobs.launch("/bin/true")
    file = Path("/run/systemd/system", launch.unit)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("[Service]\nExecStart=/bin/sleep 60\n")
    await run("systemctl", "daemon-reload")
    with pytest.raises(UnitExists, match="fragment file"):
        await launcher.start(launch)
    file.unlink()
    await run("systemctl", "daemon-reload")
    unit = await launcher.start(launch)
    assert (await unit.finished()).result == "success"
    await unit.reap()


async def test_a_bus_that_does_not_answer(jobs: Jobs, launcher: Launcher) -> None:
    """What is ordered meanwhile is done afterwards: start, stop, reap; and an end is seen."""
    slow = Launcher(call_timeout=1)
    await slow.connect()
    running = await slow.start(jobs.launch(*SLEEP, job="running"))
    ending = await slow.start(jobs.launch("/bin/sh", "-c", "sleep 1; exit 6", job="ending"))
    ended = await slow.start(jobs.launch("/bin/true", job="ended"))
    await ended.finished()
    bus = int(await run("systemctl", "show", "-P", "MainPID", "dbus.service"))
    os.kill(bus, signal.SIGSTOP)
    orders = [
        asyncio.create_task(order) for order in (
            slow.start(jobs.launch("/bin/sh", "-c", "exit 5", job="new")), running.stop(),
            ended.reap(), ending.finished(),
        )
    ]  # fmt: skip
    try:
        done, _pending = await asyncio.wait(orders, timeout=4)
    finally:
        os.kill(bus, signal.SIGCONT)
    assert not done
    new, *_rest = await asyncio.wait_for(asyncio.gather(*orders), 30)
    assert isinstance(new, Unit)
    assert (await new.finished()).exec_main_status == 5
    assert ending.state.exec_main_status == 6
    for unit in (new, running, ending):
        await unit.reap()
    await slow.close()


async def test_stopped_by_somebody_else(launcher: Launcher, jobs: Jobs) -> None:
    unit = await launcher.start(jobs.launch(*SLEEP))
    await run("systemctl", "stop", unit.name)
    state = await unit.finished()
    assert state.vanished
    assert (state.exec_main_code, state.exec_main_status) == (2, signal.SIGTERM)
    await unit.reap()


async def test_a_verdict_somebody_else_clears_stays_a_failure(
    launcher: Launcher, jobs: Jobs
) -> None:
    unit = await launcher.start(jobs.launch("/bin/sh", "-c", "sleep 0.2; exit 4"))
    state = await unit.finished()
    await run("systemctl", "reset-failed", unit.name)
    assert unit.state == state
    assert state.exec_main_status == 4
    await unit.reap()


async def test_a_running_unit_is_not_started_again(launcher: Launcher, jobs: Jobs) -> None:
    unit = await launcher.start(jobs.launch(*SLEEP))
    other = Launcher()
    await other.connect()
    with pytest.raises(UnitExists):
        await other.start(jobs.launch(*SLEEP))
    assert not unit.state.finished
    assert await other.leftovers() == [unit.name]
    await other.stop_and_reap(unit.name)
    assert (await unit.finished()).vanished
    await unit.reap()
    await other.close()


@pytest.mark.parametrize("command", ["exit 0", "exit 1"])
async def test_remains_of_an_earlier_life_are_cleared(
    launcher: Launcher, jobs: Jobs, command: str
) -> None:
    other = Launcher()
    await other.connect()
    await (await other.start(jobs.launch("/bin/sh", "-c", command))).finished()
    await other.close()
    unit = await launcher.start(jobs.launch("/bin/sh", "-c", "exit 5"))
    assert (await unit.finished()).exec_main_status == 5
    await unit.reap()


@pytest.mark.parametrize("leftover", [SLEEP, ("/bin/true",), ("/bin/false",)])
async def test_leftovers(launcher: Launcher, jobs: Jobs, leftover: tuple[str, ...]) -> None:
    other = Launcher()
    await other.connect()
    unit = await other.start(jobs.launch(*leftover))
    await other.close()
    assert await launcher.leftovers() == [unit.name]
    await launcher.stop_and_reap(unit.name)
    assert await launcher.leftovers() == []


@pytest.mark.parametrize(
    "disturbance",
    [
        ("systemctl", "kill", "--signal=KILL", "dbus.service"),
        ("systemctl", "daemon-reload"),
        ("systemctl", "daemon-reexec"),
    ],
    ids=["dbus", "reload", "reexec"],
)
@pytest.mark.parametrize("during", [True, False])
async def test_the_end_is_found_in_spite_of(
    launcher: Launcher, jobs: Jobs, disturbance: tuple[str, ...], during: bool
) -> None:
    """The disturbance comes while the program runs, or just as it ends."""
    unit = await launcher.start(jobs.launch("/bin/sh", "-c", "sleep 0.6; exit 3"))
    if not during:
        await asyncio.sleep(0.55)
    await run(*disturbance)
    state = await asyncio.wait_for(unit.finished(), 30)
    assert (state.exec_main_status, state.vanished) == (3, False)
    await unit.reap()
    again = await launcher.start(jobs.launch("/bin/true"))
    assert (await again.finished()).result == "success"
    await again.reap()


async def test_no_bus_is_said_clearly() -> None:
    launcher = Launcher(address="unix:path=/nonexistent/bus")
    with pytest.raises(SystemdError, match="/nonexistent/bus"):
        await launcher.connect()
    await launcher.close()
