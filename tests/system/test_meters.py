"""Our figures are those of the tools an operator knows: time(1) and systemd-cgtop(1)."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slowness import SLOWNESS
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher
from worker.systemd.names import Step, slice_name, unit_name
from worker.systemd.unit import Unit
from worker.systemd.usage import Usage

MIB = 1 << 20
CGROUPS = Path("/sys/fs/cgroup")
V2 = (CGROUPS / "cgroup.controllers").exists()
HYBRID = (CGROUPS / "unified/cgroup.controllers").exists()
JOINED = (CGROUPS / "cpu,cpuacct").is_mount()
"""On v1 systemd accounts CPU time in ``cpuacct``, if that is one hierarchy with ``cpu``."""
PROGRAMS = {
    name: shutil.which(name) or "" for name in ("sh", "ffmpeg", "systemd-cgtop", "taskset", "time")
}
SECONDS_OF_VIDEO = 10 if SLOWNESS == 1 else 4
"""About 2 s of CPU on a real machine, and more than ten times that on an emulated one."""

# What `time -v` prints, for where it is not installed; it has it from wait4(2), as this has.
TIME = """\
import os, sys
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(pid, 0)
with open(sys.argv[1], "w") as file:
    print("User time (seconds):", round(used.ru_utime, 2), file=file)
    print("System time (seconds):", round(used.ru_stime, 2), file=file)
    print("Maximum resident set size (kbytes):", used.ru_maxrss, file=file)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def transcode(seconds: int, *output: str) -> tuple[str, ...]:
    return (
        *(PROGRAMS["ffmpeg"], "-nostdin", "-v", "error", "-f", "lavfi"),
        *("-i", "testsrc2=rate=30:size=640x360", "-t", str(seconds)),
        *("-c:v", "libx264", "-threads", "2", "-f", *output),
    )


def timed(command: tuple[str, ...], report: Path) -> tuple[str, ...]:
    """The command, with what the kernel says of it at its end in ``report``."""
    if PROGRAMS["time"]:
        return (PROGRAMS["time"], "-v", "-o", str(report), *command)
    return (sys.executable, "-c", TIME, str(report), *command)


@dataclass(frozen=True)
class Timed:
    """What time(1) says of a command."""

    cpu_seconds: float
    max_rss_bytes: int

    @classmethod
    def read(cls, report: Path) -> Timed:
        text = report.read_text()

        def figure(name: str) -> float:
            found = re.search(rf"{re.escape(name)}: ([0-9.]+)", text)
            assert found, text
            return float(found[1])

        return cls(
            figure("User time (seconds)") + figure("System time (seconds)"),
            int(figure("Maximum resident set size (kbytes)")) * 1024,
        )


def launch(folder: Path, *argv: str, limits: UnitLimits | None = None) -> Launch:
    return Launch(
        unit=unit_name("meters", Step.MAIN),
        description="test of the meters",
        argv=argv,
        slice=slice_name("default"),
        limits=limits or UnitLimits(),
        stdout=folder / "stdout",
        stop_timeout_sec=2,
    )


async def followed(unit: Unit) -> tuple[Usage, int]:
    """The usage of a unit that is sampled until its end, and the most of a process's RssFile."""
    mapped = 0
    ended = asyncio.create_task(unit.finished())
    while not ended.done():
        unit.sample()
        mapped = max(mapped, rss_file(unit.state.control_group))
        await asyncio.wait({ended}, timeout=0.05)
    return await unit.usage(), mapped


def rss_file(control_group: str) -> int:
    """The largest part of any process that is pages of files: programs and libraries."""
    tree = CGROUPS if V2 else CGROUPS / "pids"
    most = 0
    try:
        for pid in Path(f"{tree}{control_group}/cgroup.procs").read_text().split():
            found = re.search(r"RssFile:\s+(\d+) kB", Path("/proc", pid, "status").read_text())
            most = max(most, int(found[1]) * 1024 if found else 0)
    except (FileNotFoundError, ProcessLookupError):
        pass  # over
    return most


@pytest.mark.parametrize("status", [3, 0], ids=["recorded", "sampled"])
async def test_a_transcode_costs_what_time_says_it_costs(
    launcher: Launcher, tmp_path: Path, status: int
) -> None:
    """Both look at one and the same run: two runs differ by more than two meters may.

    A failure leaves a record, which is exact. A success is known by its last sample, and by
    systemd's own accounting where systemd has any.
    """
    # Brings libraries into the page cache, so that they are not charged to the unit.
    warm = await asyncio.create_subprocess_exec(*transcode(1, "null", "-"))
    assert await warm.wait() == 0
    report, output = tmp_path / "time", tmp_path / "out.mp4"
    command = timed(transcode(SECONDS_OF_VIDEO, "mp4", str(output)), report)
    script = f'"$@" || exit 1; exit {status}'
    unit = await launcher.start(launch(tmp_path, PROGRAMS["sh"], "-c", script, "sh", *command))
    usage, mapped = await followed(unit)
    assert unit.state.exec_main_status == status
    told = Timed.read(report)
    assert usage.cpu_seconds is not None
    assert usage.memory_peak_bytes is not None
    assert told.cpu_seconds > 1

    # What time does not see: itself, the shell, and what systemd does in the unit's name before
    # the program and, with grep, after it. It rounds user and system time to 10 ms each.
    around = 0.1 * SLOWNESS
    # What two threads use from one sample to the next, which may come late.
    unsampled = 0.2 * SLOWNESS if status == 0 and not (V2 or JOINED) else 0
    assert told.cpu_seconds - 0.02 - unsampled <= usage.cpu_seconds <= told.cpu_seconds + around

    # Less than the resident set: a page of a file is charged once, to who came first, and that
    # was not this unit. All else that is resident is anonymous memory, and its own. The kernel
    # counts in batches of 64 pages for each CPU (cgroup) and thread (resident set).
    batches = 4 * MIB
    assert usage.memory_peak_bytes >= told.max_rss_bytes - mapped - batches
    # More: the page cache of the output, the kernel's memory for these processes (stacks, page
    # tables, slab), and sh and time. Pages of libraries are its own again if they were dropped
    # from the cache meanwhile; then they are part of the resident set.
    more = output.stat().st_size + 16 * MIB + batches
    assert usage.memory_peak_bytes <= told.max_rss_bytes + more
    await unit.reap()


async def cgtop(unit: str) -> tuple[int | None, int]:
    """CPU time in µs (None: not shown) and bytes of memory of a unit, from the second look."""
    process = await asyncio.create_subprocess_exec(
        *(PROGRAMS["systemd-cgtop"], "--batch", "--raw", "--iterations=2", "--delay=200ms"),
        *("--cpu=time", "--depth=10", "ffmpeg.slice"),
        stdout=asyncio.subprocess.PIPE,
    )
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0
    rows = [line.split() for line in output.splitlines()]
    found = [row for row in rows if row and row[0].endswith(f"/{unit}")]
    assert len(found) == 2, output
    # Path, tasks, CPU time, memory, input/s, output/s. The last two are rates of block devices
    # alone, while ours are sums that include the page cache: nothing to compare. A cgroup whose
    # CPU time cannot be read has "0", or in later versions "-".
    _path, _tasks, cpu, memory, *_rates = found[-1]
    return int(cpu) or None if cpu != "-" else None, int(memory)


async def test_cgtop_shows_what_we_measure(launcher: Launcher, tmp_path: Path) -> None:
    unit = await launcher.start(launch(tmp_path, *transcode(36_000, "null", "-")))
    # By then the encoder's pipeline is full, and memory does not grow any more.
    async with asyncio.timeout(30 * SLOWNESS):
        while (unit.sample().cpu_seconds or 0) < 1 * SLOWNESS:
            await asyncio.sleep(0.05)
    before = unit.sample()
    cpu_usec, memory = await cgtop(unit.name)
    after = unit.sample()
    await unit.stop()
    await unit.reap()

    assert before.cpu_seconds is not None
    assert after.cpu_seconds is not None
    assert after.memory_peak_bytes is not None
    if V2 or JOINED:
        assert cpu_usec is not None, "cgtop shows no CPU time"
    if cpu_usec is not None:
        assert before.cpu_seconds <= cpu_usec / 1e6 <= after.cpu_seconds
    # cgtop shows the moment, we the most so far: never less, and in a steady state little more.
    assert memory <= after.memory_peak_bytes <= 1.25 * memory + 4 * MIB


async def test_a_job_held_back_by_its_own_quota_says_so(launcher: Launcher, tmp_path: Path) -> None:
    """What a busy program does not get of a CPU it waits for.

    On one CPU: over several the kernel's figure is an average.
    """
    limits = UnitLimits(cpu_percent=20)
    core = str(min(os.sched_getaffinity(0)))
    busy = (PROGRAMS["taskset"], "-c", core, PROGRAMS["sh"], "-c", "while :; do :; done")
    unit = await launcher.start(launch(tmp_path, *busy, limits=limits))
    begun, before = time.monotonic(), unit.sample()
    await asyncio.sleep(3)
    wall, after = time.monotonic() - begun, unit.sample()
    await unit.stop()
    usage = await unit.usage()
    await unit.reap()
    if not (Path("/proc/pressure/cpu").exists() and (V2 or HYBRID)):
        assert usage.cpu_stall_seconds is None
        return
    assert before.cpu_seconds is not None
    assert after.cpu_seconds is not None
    assert before.cpu_stall_seconds is not None
    assert after.cpu_stall_seconds is not None
    ran = after.cpu_seconds - before.cpu_seconds
    stalled = after.cpu_stall_seconds - before.cpu_stall_seconds
    assert stalled >= 0.5 * wall, "a fifth of a CPU leaves four fifths to wait"
    # It runs or it waits; what is missing is the time between the looks at clock and counters.
    assert ran + stalled == pytest.approx(wall, abs=0.1 + 0.05 * SLOWNESS)
    assert usage.cpu_stall_seconds is not None
    assert usage.cpu_stall_seconds >= after.cpu_stall_seconds
    assert usage.memory_stall_seconds is not None
    assert usage.io_stall_seconds is not None
