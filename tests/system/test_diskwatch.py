"""Jobs in their sandbox that fill the disk, each in its way, and the watch that ends them."""

from __future__ import annotations

import asyncio
import grp
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slowness import SLOWNESS
from worker.diskwatch import DiskWatch
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher
from worker.systemd.sandbox import JobRoot, Sandbox
from worker.systemd.unit import Unit

GROUP = "ffmpeg-worker"
PYTHON = "/usr/bin/python3"
MIB = 1 << 20
LIMIT = 64 * MIB
MOST = 1024 * MIB
"""What a program of these writes at most, should nobody stop it."""
BEGIN = f"""
import mmap, os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
block = bytes({4 * MIB})
def writes():
    for number in range({MOST // (4 * MIB)}):
        yield str(number)
        time.sleep(0.01)
    signal.pause()
"""
NAMED = """
for name in writes():
    open(name, 'wb', 0).write(block)
"""
DELETED = """
files = []
for name in writes():
    files.append(open(name, 'wb', 0))
    os.unlink(name)
    files[-1].write(block)
"""
MAPPED = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 5]
for name in writes():
    with open(name, 'w+b', 0) as file:
        os.unlink(name)
        file.write(block)
        assert libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
"""
"""Not with mmap.mmap(), which keeps the file open."""
FORKING = """
for name in writes():
    if os.fork() == 0:
        file = open(name, 'wb', 0)
        os.unlink(name)
        file.write(block)
        while True:
            signal.pause()
"""


@pytest.fixture
def work_dir() -> Iterator[Path]:
    subprocess.run(["groupadd", "--system", "--force", GROUP], check=True)
    path = Path("/var/lib/ffmpeg-worker-watch")
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


async def started(launcher: Launcher, work_dir: Path, program: str) -> tuple[Unit, Path]:
    folder = work_dir / "job/files"
    folder.mkdir(parents=True)
    os.chown(folder, 0, grp.getgrnam(GROUP).gr_gid)
    folder.chmod(0o770)
    unit = await launcher.start(
        Launch(
            unit="ffmpeg-job-one.service",
            description="a job that fills the disk",
            argv=(PYTHON, "-c", BEGIN + program),
            slice="ffmpeg-default.slice",
            limits=UnitLimits(memory_bytes=2048 * MIB, file_bytes=LIMIT),
            stdout=folder.parent / "main.out",
            working_directory=folder,
            sandbox=Sandbox(JobRoot.prepare(work_dir / "root"), folder, group=GROUP),
        )
    )
    return unit, folder


@pytest.mark.parametrize(
    ("program", "deleted"),
    [(NAMED, False), (DELETED, True), (MAPPED, True), (FORKING, True)],
    ids=["named", "deleted", "mapped", "forking"],
)
async def test_a_job_that_fills_the_disk_is_ended(
    launcher: Launcher, work_dir: Path, program: str, deleted: bool
) -> None:
    unit, folder = await started(launcher, work_dir, program)
    kills: list[asyncio.Task[list[object]]] = []

    def kill() -> None:
        order = launcher.repeat("KillUnit", "ssi", unit.name, "all", int(signal.SIGKILL))
        kills.append(asyncio.create_task(order))

    watch = DiskWatch()
    begun = time.monotonic()
    with watch.over(
        folder,
        LIMIT,
        control_group=lambda: unit.state.control_group,
        on_exceeded=kill,
        also=(unit.launch.stdout,),
    ) as guard:
        async with asyncio.timeout(10 * SLOWNESS):
            state = await unit.finished()
        took = time.monotonic() - begun
        assert (await guard.final()).startswith("disk limit of 64 MB exceeded (")
    print(f"{took:.2f} s: {guard.exceeded}")
    assert ("deleted but in use" in guard.exceeded) == deleted
    assert (state.exec_main_code, state.exec_main_status) == (2, signal.SIGKILL)
    await asyncio.gather(*kills)
    await unit.reap()
    watch.close()
