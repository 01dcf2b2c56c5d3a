"""The sandbox on a real systemd: codecs work in it, and `systemd-analyze security` approves.

What a hostile program finds in it is tried in tests/attack. Runs inside the test bed.
"""

from __future__ import annotations

import asyncio
import grp
import itertools
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slowness import SLOWNESS
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher
from worker.systemd.names import slice_name
from worker.systemd.sandbox import Device, JobRoot, Sandbox
from worker.systemd.unit import Unit

GROUP = "ffmpeg-worker"
FFMPEG = ("/usr/bin/ffmpeg", "-nostdin", "-v", "error")
SLEEP = ("/bin/sleep", str(60 * SLOWNESS))
MIB = 1 << 20
Start = Callable[..., Awaitable[Unit]]


@pytest.fixture(scope="module")
def group() -> int:
    subprocess.run(["groupadd", "--system", "--force", GROUP], check=True)
    return grp.getgrnam(GROUP).gr_gid


@pytest.fixture
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = Path("/var/lib/ffmpeg-worker-test")
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def start(launcher: Launcher, work_dir: Path, group: int) -> AsyncIterator[Start]:
    root = JobRoot.prepare(work_dir / "root")
    units: list[Unit] = []
    numbers = itertools.count(1)

    async def start(*argv: str, memory_mb: int = 1024, **options: Any) -> Unit:
        name = f"sandbox-{next(numbers)}"
        folder = work_dir / "jobs" / name / "files"
        folder.mkdir(parents=True)
        os.chown(folder, 0, group)
        folder.chmod(0o770)
        unit = await launcher.start(
            Launch(
                unit=f"ffmpeg-job-{name}.service",
                description="a test",
                argv=argv,
                slice=slice_name("default"),
                limits=UnitLimits(memory_bytes=memory_mb * MIB, file_bytes=50 * MIB),
                stdout=folder.parent / "main.out",
                working_directory=folder,
                sandbox=Sandbox(root, folder, group=GROUP, **options),
            )
        )
        units.append(unit)
        return unit

    yield start
    for unit in units:
        await unit.reap()


def exposure(unit: str) -> float:
    text = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", unit], capture_output=True, text=True
    ).stdout
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", text)
    assert found, text
    return float(found[1])


async def output(unit: Unit) -> str:
    async with asyncio.timeout(30 * SLOWNESS):
        state = await unit.finished()
    text = unit.launch.stdout.read_text()
    assert (state.result, state.exec_main_status) == ("success", 0), text
    return text


@pytest.fixture
def media(work_dir: Path, group: int) -> Path:
    """An input that the group of jobs may read, and nobody else."""
    path = work_dir / "in.mkv"
    sources = ("-f", "lavfi", "-i", "testsrc2=duration=1:size=160x120:rate=10")
    sound = ("-f", "lavfi", "-i", "sine=duration=1")
    subprocess.run([*FFMPEG, *sources, *sound, str(path)], check=True)
    os.chown(path, 0, group)
    path.chmod(0o640)
    return path


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [("libx264", "mp4"), ("libx265", "mp4"), ("libvpx-vp9", "webm"), ("libsvtav1", "mkv")],
)
async def test_codecs_work_and_exposure_is_low(
    start: Start, media: Path, codec: str, suffix: str
) -> None:
    sound = ("-c:a", "libopus" if suffix == "webm" else "aac")
    command = (*FFMPEG, "-i", str(media), "-c:v", codec, *sound, f"out.{suffix}")
    unit = await start(*command, readable=(media,))
    await output(unit)
    assert exposure(unit.name) <= 0.3
    made = unit.launch.working_directory
    assert made is not None
    found = (made / f"out.{suffix}").stat()
    assert found.st_size > 1000
    assert 61184 <= found.st_uid <= 65519  # systemd.exec(5), DynamicUser=
    assert stat.S_IMODE(found.st_mode) == 0o600


async def test_an_encoder_finds_all_processors(start: Start) -> None:
    """x265 works with one thread where it cannot see them in /sys/devices."""
    source = "testsrc2=duration=0.2:size=640x360"
    line = f"{shlex.join(FFMPEG)} -loglevel info -f lavfi -i {source} -c:v libx265 out.mp4 2>&1"
    text = await output(await start("/bin/sh", "-c", line))
    assert f"Thread pool created using {os.cpu_count()} threads" in text


async def test_cgroups_of_others_cannot_be_seen(start: Start) -> None:
    text = await output(await start("/bin/sh", "-c", "ls /sys/fs /sys/kernel 2>&1; true"))
    assert text.count("Permission denied") == 2


async def test_text_can_be_drawn(start: Start) -> None:
    graph = "color=duration=0.2,drawtext=text=hello"
    await output(await start(*FFMPEG, "-f", "lavfi", "-i", graph, "out.mp4"))


async def test_exposure_of_a_streaming_job(start: Start) -> None:
    unit = await start(*SLEEP, network=True)
    assert exposure(unit.name) <= 1.2


async def test_names_are_looked_up_and_hosts_reached_by_a_streaming_job(start: Start) -> None:
    code = (
        "import socket; server = socket.create_server(('localhost', 0));"
        "socket.create_connection(('localhost', server.getsockname()[1]), 5); print('reached')"
    )
    assert "reached" in await output(await start("/usr/bin/python3", "-c", code, network=True))


async def test_two_jobs_are_two_users_who_see_nothing_of_each_other(start: Start) -> None:
    one = await start(*SLEEP)
    uids = {Path(f"/proc/{one.state.main_pid}").stat().st_uid}
    code = (
        "import os, sys; pid = sys.argv[1]; print(os.getuid(), os.path.exists(f'/proc/{pid}'));"
        "\ntry: os.kill(int(pid), 0); print('killed')\nexcept OSError: print('refused')"
    )
    text = await output(await start("/usr/bin/python3", "-c", code, str(one.state.main_pid)))
    uid, seen, killed = text.split()
    assert {int(uid)}.isdisjoint(uids)
    assert (seen, killed) == ("False", "refused")


async def test_the_kernels_limit_on_memory_is_told_from_a_kill(start: Start) -> None:
    unit = await start("/usr/bin/python3", "-c", "bytearray(300 << 20)", memory_mb=64)
    await unit.finished()
    usage = await unit.usage()
    assert usage.oom_kills, unit.launch.stdout.read_text()


async def test_a_device_is_there_if_it_is_given_and_no_other(start: Start) -> None:
    nodes = Path("/dev/dri")
    nodes.mkdir()
    try:
        for name in ("renderD128", "card0"):  # the number of /dev/net/tun, which anybody may open
            os.mknod(nodes / name, stat.S_IFCHR | 0o660, os.makedev(10, 200))
            shutil.chown(nodes / name, group="video")
            (nodes / name).chmod(0o660)
        code = "import os; print(os.listdir('/dev/dri')); os.open('/dev/dri/renderD128', os.O_RDWR)"
        given = (Device("/dev/dri/renderD128", "video"),)
        text = await output(await start("/usr/bin/python3", "-c", code, devices=given))
        assert text == "['renderD128']\n"
        text = await output(
            await start("/usr/bin/python3", "-c", "import os; print(os.path.exists('/dev/dri'))")
        )
        assert text == "False\n"
    finally:
        shutil.rmtree(nodes)


async def test_code_may_be_generated_only_where_it_must(start: Start) -> None:
    code = "import mmap; mmap.mmap(-1, 4096, prot=7); print('mapped')"
    assert "mapped" in await output(
        await start("/usr/bin/python3", "-c", code, generates_code=True)
    )
    refused = await start("/usr/bin/python3", "-c", code)
    assert (await refused.finished()).exec_main_status == 1
