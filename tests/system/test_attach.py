"""Limits for processes that somebody else started, on a real systemd: they hold, and go again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from tests.slowness import SLOWNESS
from tests.system.commands import run, tried, until
from tests.system.foreign import (
    FAMILY,
    FAMILY_SIZE,
    LOOK,
    PYTHON,
    SLEEP,
    Foreign,
    attach,
    cpu_seconds,
    cpu_share,
    detach,
    family,
    refused,
    units,
    units_of,
    worker,
)
from worker.systemd.attachment import scope_name
from worker.systemd.processes import InForce, limits_in_force

MIB = 1 << 20
FFMPEG = (
    *("ffmpeg", "-hide_banner", "-loglevel", "error", "-nostats", "-nostdin"),
    *("-f", "lavfi", "-i", "testsrc2=size=1280x720:rate=30", "-c:v", "libx264", "-f", "null", "-"),
)
FED_FFMPEG = (
    *("ffmpeg", "-hide_banner", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "yuv420p"),
    *("-s", "1920x1080", "-i", "pipe:0", "-c:v", "libx264", "-f", "null", "-"),
)
FRAME_BYTES = 1920 * 1080 * 3 // 2


async def test_a_twentieth_of_a_core_for_a_foreign_ffmpeg_and_more_again(foreign: Foreign) -> None:
    process = await foreign.start(*FFMPEG)
    await until(lambda: cpu_seconds(process.pid) > 0.3)
    output = await attach(process.pid, "--cpu-percent", "5")
    unit = scope_name(process.pid)
    assert output.splitlines()[0].startswith(f"{unit}: 1 process of ffmpeg ({process.pid})")
    assert "CPU: at most 5 % of a core, together" in output
    assert "warning" not in output.lower()
    assert units_of([process.pid]) == {unit}
    assert await cpu_share([process.pid]) == pytest.approx(0.05, abs=0.02)

    output = await detach(process.pid)
    assert f"1 process without limits now, in ffmpeg-detached-{process.pid}.scope" in output
    assert await units() == [f"ffmpeg-detached-{process.pid}.scope"]
    assert await cpu_share([process.pid]) > 0.1
    cgroups = LOOK.cgroups(process.pid)
    assert limits_in_force(f"ffmpeg-detached-{process.pid}.scope", cgroups) == InForce()
    assert process.returncode is None


async def test_the_memory_limit_kills_a_foreign_ffmpeg(foreign: Foreign) -> None:
    process = await foreign.start(*FED_FFMPEG)
    output = await attach(process.pid, "--memory-mb", "64")
    assert "memory: at most 64 MB, together" in output
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(200):
            process.stdin.write(bytes(FRAME_BYTES))
            await process.stdin.drain()
    async with asyncio.timeout(20 * SLOWNESS):
        assert await process.wait() == -signal.SIGKILL


async def test_without_the_memory_limit_it_lives(foreign: Foreign) -> None:
    process = await foreign.start(*FED_FFMPEG)
    await attach(process.pid, "--memory-mb", "64")
    await detach(process.pid)
    assert process.stdin is not None
    for _ in range(60):
        process.stdin.write(bytes(FRAME_BYTES))
        await process.stdin.drain()
    process.stdin.close()
    async with asyncio.timeout(60 * SLOWNESS):
        assert await process.wait() == 0


async def test_memory_held_before_is_told_to_be_left_out(foreign: Foreign) -> None:
    held = f"x = bytearray({100 * MIB}); print(len(x), flush=True); input()"
    process = await foreign.start(PYTHON, "-c", held)
    await until(lambda: LOOK.anonymous_bytes(process.pid) > 100 * MIB)
    output = await attach(process.pid, "--memory-mb", "64")
    assert "MB that the processes hold already are not counted" in output
    assert process.returncode is None


async def test_the_time_limit_ends_all_of_it(foreign: Foreign) -> None:
    process = await foreign.start(*FAMILY, children=FAMILY_SIZE)
    output = await attach(process.pid, "--timeout", "1")
    assert "time: ends in 1 s" in output
    members = family(process.pid)
    async with asyncio.timeout(5 * SLOWNESS):
        assert await process.wait() == -signal.SIGTERM
    await until(lambda: not any(LOOK.unit(pid) == scope_name(process.pid) for pid in members))


async def test_detach_lifts_the_time_limit_too(foreign: Foreign) -> None:
    process = await foreign.start(*SLEEP)
    limit, begun = 3 + round(SLOWNESS / 2), time.monotonic()  # the two commands take less
    await attach(process.pid, "--timeout", str(limit))
    await detach(process.pid)
    await asyncio.sleep(begun + limit + 2 - time.monotonic())
    assert process.returncode is None


async def test_children_are_included_those_to_come_as_well(foreign: Foreign) -> None:
    two = "for i in 1 2; do sh -c 'while :; do :; done' & done; read x; sleep 300 & wait"
    process = await foreign.start("sh", "-c", two, children=3)
    output = await attach(process.pid, "--cpu-percent", "10")
    assert f"{scope_name(process.pid)}: 3 processes" in output
    assert await cpu_share(family(process.pid)) == pytest.approx(0.1, abs=0.03)
    assert process.stdin is not None
    process.stdin.write(b"\n")
    await until(lambda: len(family(process.pid)) == 4)
    assert units_of(family(process.pid)) == {scope_name(process.pid)}
    assert "4 processes without limits now" in await detach(process.pid)
    assert units_of(family(process.pid)) == {f"ffmpeg-detached-{process.pid}.scope"}


async def test_children_born_during_the_move(foreign: Foreign) -> None:
    # each child makes a child of its own, as fast as it can, some of them short-lived
    program = (
        "import os, time\n"
        "for number in range(120):\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(0.004)\n"
        "        if number % 3 and os.fork(): time.sleep(300)\n"
        "        time.sleep(0.05 if number % 2 else 300)\n"
        "        os._exit(0)\n"
        "    time.sleep(0.004)\n"
        "time.sleep(300)\n"
    )
    for _ in range(3):
        process = await foreign.start(PYTHON, "-c", program, children=10)
        output = await attach(process.pid, "--cpu-percent", "100")
        assert "could not be limited" not in output
        assert units_of(family(process.pid)) == {scope_name(process.pid)}
        await detach(process.pid)
        assert units_of(family(process.pid)) == {f"ffmpeg-detached-{process.pid}.scope"}
        assert process.returncode is None


async def test_attach_again_after_a_detach(foreign: Foreign) -> None:
    process = await foreign.start(*FAMILY, children=FAMILY_SIZE)
    for _ in range(3):
        await attach(process.pid, "--cpu-percent", "50")
        assert units_of(family(process.pid)) == {scope_name(process.pid)}
        await detach(process.pid)
    await attach(process.pid, "--cpu-percent", "50")
    assert await units() == [scope_name(process.pid)]


async def test_detach_of_what_an_ended_process_left_behind(foreign: Foreign) -> None:
    process = await foreign.start("sh", "-c", "sleep 300 & read x", children=2)
    await attach(process.pid, "--cpu-percent", "50")
    (orphan,) = family(process.pid) - {process.pid}
    process.kill()
    await process.wait()
    try:
        assert "1 process without limits now" in await detach(process.pid)
        assert units_of([orphan]) == {f"ffmpeg-detached-{process.pid}.scope"}
    finally:
        os.kill(orphan, signal.SIGKILL)


async def test_limits_above_the_machine_are_lowered(foreign: Foreign) -> None:
    process = await foreign.start(*SLEEP)
    output = await attach(process.pid, "--cpu-percent", "999999", "--memory-mb", "900000000")
    cpus = len(os.sched_getaffinity(1))
    assert f"CPU limit lowered from 999999 % to {100 * cpus} %" in output
    assert "memory limit lowered from 900000000 MB" in output
    assert f"CPU: at most {100 * cpus} % of a core" in output
    assert "does not hold" not in output


async def test_in_the_user_s_own_manager(foreign: Foreign, tmp_path: Path) -> None:
    process = await foreign.start(*FAMILY, children=FAMILY_SIZE)
    manager = "user-manager.service"
    place = {"XDG_RUNTIME_DIR": str(tmp_path)}

    async def answers() -> bool:
        status = ("busctl", "--user", "status", "org.freedesktop.systemd1")
        return (await tried(*status, environment=place))[0] == 0

    await run(
        *("systemd-run", "-q", f"--unit={manager}", "-p", "Delegate=yes"),
        *("-E", f"XDG_RUNTIME_DIR={tmp_path}", "/lib/systemd/systemd", "--user"),
    )
    try:
        await until(lambda: (tmp_path / "bus").exists())
        await until(answers)
        flags = ("--user", "--cpu-percent", "50")
        output = await run(*worker("attach", *flags, process.pid), environment=place)
        assert units_of(family(process.pid)) == {scope_name(process.pid)}
        # without delegated controllers (always so on cgroup v1) nothing holds, and that is said
        v2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        assert ("CPU: at most 50 %" in output) is v2
        assert ("the CPU limit does not hold, there is none in force" in output) is not v2
        text = await refused(*worker("detach", process.pid))
        assert "is attached in another service manager: try it with --user" in text
        await run(*worker("detach", "--user", process.pid), environment=place)
        assert units_of(family(process.pid)) == {f"ffmpeg-detached-{process.pid}.scope"}
        assert len(family(process.pid)) == FAMILY_SIZE
    finally:
        await foreign.end()
        await run("systemctl", "stop", manager)
