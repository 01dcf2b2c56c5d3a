"""The launcher on a real systemd: limits that hold, verdicts that are true, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.slowness import SLOWNESS
from tests.system.commands import run
from tests.system.launching import SLEEP, Jobs
from worker.errors import Reason
from worker.jobs.judge import judge
from worker.jobs.outcome import Intent
from worker.jobs.progress import LogFacts
from worker.jobs.spec import Limits
from worker.systemd.launcher import Launcher
from worker.systemd.names import slice_name
from worker.systemd.unit import Unit
from worker.systemd.usage import Usage

MIB = 1 << 20
SLICES = Path(__file__).parents[2] / "units"
BUSY = ("/bin/sh", "-c", "while :; do :; done")
HOG = f"x = bytearray({200 * MIB})"
PYTHON = shutil.which("python3") or sys.executable
SHARE_ERROR = 0.05 if SLOWNESS == 1 else 0.15
"""Of a share of a CPU. An emulated one stands still at times: whoever has it then is charged."""


async def cpu_share(unit: Unit, seconds: float) -> float:
    """Cores used, by the cgroup's own counter."""
    before, begun = unit.sample().cpu_seconds, time.monotonic()
    await asyncio.sleep(seconds)
    after, ended = unit.sample().cpu_seconds, time.monotonic()
    assert before is not None
    assert after is not None
    return (after - before) / (ended - begun)


def busy_on_one_core() -> tuple[str, ...]:
    """A program that has to share its core with others like it."""
    taskset = shutil.which("taskset")
    assert taskset is not None
    return (taskset, "-c", str(min(os.sched_getaffinity(0))), *BUSY)


def idle_seconds() -> float:
    """Of all cores together, since boot."""
    return float(Path("/proc/uptime").read_text().split()[1])


async def test_half_a_core_is_half_a_core(launcher: Launcher, jobs: Jobs) -> None:
    """Never more; and where others use the machine too, no less while they leave it."""
    unit = await launcher.start(jobs.launch(*BUSY, cpu_percent=50))
    for _ in range(4):
        begun, idle_before = time.monotonic(), idle_seconds()
        share = await cpu_share(unit, 4.5)
        idle = (idle_seconds() - idle_before) / (time.monotonic() - begun)
        assert share <= 0.55
        if share >= 0.45:
            break
    assert share >= 0.45 or idle < 0.1, f"{share} cores used while {idle} were idle"
    await unit.stop()
    await unit.reap()


async def test_a_memory_limit_kills_and_is_told_every_time(launcher: Launcher, jobs: Jobs) -> None:
    """The program alone, as a child, and as two children at once.

    On cgroup v2 systemd may end the unit before the usage record is written. The verdict stands
    all the same; so does the peak from 255 on, where systemd itself knows it.
    """
    program = (PYTHON, "-c", HOG)
    child = ("/bin/sh", "-c", f"{PYTHON} -c '{HOG}'; exit $?")
    two = ("/bin/sh", "-c", f"{PYTHON} -c '{HOG}' & {PYTHON} -c '{HOG}'; x=$?; wait; exit $x")
    limits = Limits(cpu_percent=100, memory_mb=64, disk_mb=100, timeout_sec=60)
    lost = 0
    for number in range(24):
        argv = (program, child, two)[number % 3]
        unit = await launcher.start(jobs.launch(*argv, job=f"oom-{number}", memory_bytes=64 * MIB))
        state = await unit.finished()
        usage = await unit.usage()
        seen = f"{number}: {state}, {usage}"
        outcome = judge(state, usage, Intent.NONE, LogFacts(), limits)
        assert outcome.reason is Reason.RESOURCE_ERROR, seen
        assert outcome.message.startswith("memory limit of 64 MB exceeded"), seen
        assert state.active_state == "failed", seen
        if usage.memory_peak_bytes is None:
            assert launcher.version < 255, seen
            assert state.result == "oom-kill", seen
            lost += 1
        else:
            assert 60 * MIB < usage.memory_peak_bytes <= 64 * MIB, seen
        print(seen)
        await unit.reap()
    assert lost <= 3


async def test_a_kill_is_not_taken_for_lack_of_memory(launcher: Launcher, jobs: Jobs) -> None:
    unit = await launcher.start(jobs.launch(*SLEEP, memory_bytes=64 * MIB))
    os.kill(unit.state.main_pid, signal.SIGKILL)
    state = await unit.finished()
    assert (state.result, state.exec_main_code, state.exec_main_status) == ("signal", 2, 9)
    assert (await unit.usage()).oom_kills == 0
    await unit.reap()


async def test_a_time_limit(launcher: Launcher, jobs: Jobs) -> None:
    unit = await launcher.start(jobs.launch(*SLEEP, runtime_sec=1))
    state = await unit.finished()
    assert state.result == "timeout"
    assert state.wall_seconds == pytest.approx(1, abs=0.5)
    await unit.reap()


async def test_a_file_limit(launcher: Launcher, jobs: Jobs) -> None:
    target = jobs.folder / "big"
    unit = await launcher.start(
        jobs.launch("/bin/dd", "if=/dev/zero", f"of={target}", "bs=64k", file_bytes=MIB)
    )
    state = await unit.finished()
    assert state.exec_main_code in (2, 3)  # with or without a core dump
    assert state.exec_main_status == signal.SIGXFSZ
    assert target.stat().st_size == MIB
    await unit.reap()


async def test_a_task_limit(launcher: Launcher, jobs: Jobs) -> None:
    program = "for i in 1 2 3 4; do sleep 1 & done; wait; exit 9"
    unit = await launcher.start(jobs.launch("/bin/sh", "-c", program, tasks_max=2))
    await unit.finished()
    assert (await unit.usage()).task_limit_hits
    await unit.reap()


async def test_a_program_that_is_not_there(launcher: Launcher, jobs: Jobs) -> None:
    unit = await launcher.start(jobs.launch("/nonexistent/ffmpeg"))
    assert not unit.started
    state = await unit.finished()
    assert state.exec_failed
    assert state.exec_main_status == 203
    await unit.reap()


@pytest.mark.parametrize("status", [0, 1, 69, 200, 203, 234, 255])
async def test_exit_statuses(launcher: Launcher, jobs: Jobs, status: int) -> None:
    unit = await launcher.start(jobs.launch("/bin/sh", "-c", f"sleep 0.1; exit {status}"))
    assert unit.started
    state = await unit.finished()
    assert (state.exec_main_code, state.exec_main_status) == (1, status)
    assert state.result == ("exit-code" if status else "success")
    assert not state.vanished
    await unit.reap()
    assert unit.state == state


async def test_very_short_programs_are_never_missed(launcher: Launcher, jobs: Jobs) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(50):
        unit = await launcher.start(jobs.launch("/bin/true", job=f"short-{number % 3}"))
        state = await unit.finished()
        assert (state.result, state.exec_main_code, state.vanished) == ("success", 1, False)
        await unit.reap()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


async def test_many_at_once(launcher: Launcher, jobs: Jobs) -> None:
    units = await asyncio.gather(
        *(launcher.start(jobs.launch("/bin/true", job=f"many-{i}")) for i in range(60))
    )
    states = await asyncio.gather(*(unit.finished() for unit in units))
    assert {state.result for state in states} == {"success"}
    await asyncio.gather(*(unit.reap() for unit in units))


async def test_stop(launcher: Launcher, jobs: Jobs) -> None:
    unit = await launcher.start(jobs.launch(*SLEEP))
    await unit.stop()
    assert (unit.state.exec_main_code, unit.state.exec_main_status) == (2, signal.SIGTERM)
    await unit.reap()


async def test_stop_of_a_program_that_ignores_it(launcher: Launcher, jobs: Jobs) -> None:
    unit = await launcher.start(
        jobs.launch("/bin/sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
    )
    begun = time.monotonic()
    await unit.stop()
    assert 1.5 < time.monotonic() - begun < 5 + SLOWNESS
    assert unit.state.exec_main_status == signal.SIGKILL
    await unit.reap()


async def test_stop_of_a_suspended_program(launcher: Launcher, jobs: Jobs) -> None:
    unit = await launcher.start(jobs.launch(*SLEEP))
    os.kill(unit.state.main_pid, signal.SIGSTOP)
    await unit.stop()
    assert unit.state.exec_main_code == 2
    await unit.reap()


@pytest.mark.parametrize("status", [0, 3])
async def test_no_process_gets_away(launcher: Launcher, jobs: Jobs, status: int) -> None:
    """One that leaves its session and its parent, and ignores SIGTERM, still ends."""
    away = (
        "import os, signal, time\n"
        "if os.fork():\n"
        f"    time.sleep(0.3); os._exit({status})\n"
        "os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork(): os._exit(0)\n"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    unit = await launcher.start(jobs.launch(PYTHON, "-c", away))
    assert (await unit.finished()).exec_main_status == status
    pid = unit.launch.stdout.read_text().split()[0]
    await unit.reap()
    assert not Path("/proc", pid).exists()


async def test_arguments_arrive_as_they_are(launcher: Launcher, jobs: Jobs) -> None:
    arguments = [
        "$HOME", "${HOME}", "a$b", "$$", "$", "%n", "%%", "a b", "", "'", '"', "\\", "\\x41", ";",
        "-i", "ä🎬", "line\nbreak", "tab\t", "*", "~", "#", "@x", "+y", "!z", ":w", "{a,b}",
    ]  # fmt: skip
    program = "import json, sys; print(json.dumps(sys.argv[1:]))"
    unit = await launcher.start(jobs.launch(PYTHON, "-c", program, *arguments))
    assert (await unit.finished()).result == "success"
    assert json.loads(unit.launch.stdout.read_text()) == arguments
    await unit.reap()


async def test_the_surroundings_of_a_program(launcher: Launcher, jobs: Jobs) -> None:
    program = 'umask; pwd; echo "$A"; nice; cat; grep NoNewPrivs /proc/self/status'
    unit = await launcher.start(
        jobs.launch(
            "/bin/sh", "-c", program, environment={"A": "1 $B %n"}, working_directory=jobs.folder
        )
    )
    await unit.finished()
    lines = unit.launch.stdout.read_text().splitlines()
    assert lines[:4] == ["0077", str(jobs.folder), "1 $B %n", "10"]
    assert lines[4].split() == ["NoNewPrivs:", "1"]
    await unit.reap()


async def test_the_journal_knows_the_job(launcher: Launcher, jobs: Jobs) -> None:
    identity = f"id-{os.getpid()}"
    unit = await launcher.start(
        jobs.launch(
            "/bin/sh", "-c", "echo trouble >&2", journal_fields={"JOB_ID": f"{identity}\nX=1"}
        )
    )
    await unit.finished()
    await unit.reap()
    await run("journalctl", "--sync")
    output = await run("journalctl", "-o", "json", f"JOB_ID={identity}\\nX=1")
    entries = [json.loads(line) for line in output.splitlines()]
    (entry,) = [entry for entry in entries if entry["MESSAGE"] == "trouble"]
    assert entry["SYSLOG_IDENTIFIER"] == "ffmpeg-job"
    assert entry["_SYSTEMD_UNIT"] == unit.name
    assert "X" not in entry


async def test_what_a_unit_used(launcher: Launcher, jobs: Jobs) -> None:
    program = (
        "open('big', 'wb').write(bytes(5_000_000)); n = 0\n"
        "import time; end = time.process_time() + 0.5\n"
        "while time.process_time() < end: n += 1\n"
        "raise SystemExit(1)"
    )
    unit = await launcher.start(jobs.launch(PYTHON, "-c", program, working_directory=jobs.folder))
    best = Usage()
    while not unit.state.finished:
        best = best.merged(unit.sample())
        await asyncio.sleep(0.05)
    usage = await unit.usage()
    assert usage.cpu_seconds is not None
    assert 0.35 <= usage.cpu_seconds < 0.5 + 0.25 * SLOWNESS
    assert usage.io_write_bytes is not None
    assert usage.io_write_bytes >= 5_000_000
    assert usage.memory_peak_bytes is not None
    assert usage.memory_peak_bytes > 5_000_000
    assert usage.merged(best) == usage
    await unit.reap()


@pytest.fixture
async def slices() -> AsyncIterator[None]:
    """The project's slices, for as long as they are not installed."""
    names = ["ffmpeg.slice", "ffmpeg-live.slice", "ffmpeg-batch.slice"]
    folder = Path("/run/systemd/system")
    folder.mkdir(parents=True, exist_ok=True)
    made = [
        folder / name
        for name in names
        if not await run("systemctl", "show", "-P", "FragmentPath", name)
    ]
    for path in made:
        shutil.copyfile(SLICES / path.name, path)
    await run("systemctl", "daemon-reload")
    yield
    for path in made:
        path.unlink()
    await run("systemctl", "daemon-reload")


@pytest.mark.usefixtures("slices")
async def test_live_goes_before_batch(launcher: Launcher, jobs: Jobs) -> None:
    units = {
        queue: await launcher.start(
            jobs.launch(*busy_on_one_core(), job=f"loop-{queue}", queue=queue)
        )
        for queue in ("live", "batch")
    }
    weights = {
        queue: int(await run("systemctl", "show", "-P", "CPUWeight", slice_name(queue)))
        for queue in units
    }
    used = dict(
        zip(units, await asyncio.gather(*(cpu_share(u, 5) for u in units.values())), strict=True)
    )
    expected = weights["live"] / sum(weights.values())
    assert used["live"] / sum(used.values()) == pytest.approx(expected, abs=SHARE_ERROR)
    for unit in units.values():
        await unit.stop()
        await unit.reap()


async def test_priority_counts_within_a_queue(launcher: Launcher, jobs: Jobs) -> None:
    weights = (200, 50)
    units = [
        await launcher.start(
            jobs.launch(*busy_on_one_core(), job=f"weight-{weight}", cpu_weight=weight)
        )
        for weight in weights
    ]
    high, low = await asyncio.gather(*(cpu_share(unit, 5) for unit in units))
    assert high / (high + low) == pytest.approx(0.8, abs=SHARE_ERROR)
    for unit in units:
        await unit.stop()
        await unit.reap()
