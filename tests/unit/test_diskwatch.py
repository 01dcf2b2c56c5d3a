"""What a job takes of the disk is counted, by real processes that take too much of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from worker import diskcount, diskwatch
from worker.diskcount import MIB, Count
from worker.diskwatch import DiskGuard, DiskWatch, _Disk
from worker.errors import JobError

GROUP = "/ffmpeg.slice/ffmpeg-job-1.service"
FOREVER = "\nprint(flush=True)\nimport time\ntime.sleep(600)"
DELETED = f"""
import os
f = open('x', 'wb', 0)
os.unlink('x')
f.write(b'x' * (3 << 20))
{FOREVER}"""


class Job:
    """A folder, a process that works in it, and a watch over both."""

    def __init__(self, base: Path) -> None:
        self.folder = base / "files"
        self.folder.mkdir()
        self.cgroups = base / "cgroups"
        self.group = self.cgroups / "systemd" / GROUP[1:]
        self.group.mkdir(parents=True)
        self.free = 10**12
        self.watch = DiskWatch(interval=0.02, cgroups=self.cgroups, free_bytes=lambda _: self.free)
        self.stopped = asyncio.Event()
        self.process: asyncio.subprocess.Process | None = None

    def over(self, limit: int = MIB, **options: object) -> DiskGuard:
        return self.watch.over(
            self.folder,
            limit,
            control_group=lambda: GROUP,
            on_exceeded=self._kill,
            **options,  # type: ignore[arg-type]
        )

    def _kill(self) -> None:
        self.stopped.set()
        if self.process is not None:
            self.process.kill()

    async def run(self, program: str) -> None:
        """Start it, and wait for its first line of output."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            program,
            cwd=self.folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        (self.group / "cgroup.procs").write_text(f"{self.process.pid}\n")
        assert self.process.stdout is not None
        await self.process.stdout.readline()

    async def wait_stopped(self) -> None:
        async with asyncio.timeout(20):
            await self.stopped.wait()
            if self.process is not None:
                await self.process.wait()

    async def rounds(self, number: int = 3) -> None:
        for _ in range(number):
            await self.watch._round()

    async def end(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.communicate()
        self.watch.close()


@pytest.fixture
async def job(tmp_path: Path) -> AsyncIterator[Job]:
    job = Job(tmp_path)
    yield job
    await job.end()


async def test_many_files(job: Job) -> None:
    with job.over() as guard:
        await job.run(
            "import time\nprint(flush=True)\nn = 0\nwhile True:\n n += 1\n"
            " open(f'{n}.ts', 'wb').write(b'x' * 65536)\n time.sleep(0.001)"
        )
        await job.wait_stopped()
        found = re.fullmatch(
            r"disk limit of 1 MB exceeded \((\d+) MB in (\d+) files\)", guard.exceeded
        )
        assert found, guard.exceeded
        assert int(found[1]) >= 2
        assert int(found[2]) > 16


async def test_a_file_that_was_deleted_while_open(job: Job) -> None:
    with job.over() as guard:
        await job.rounds(2)
        await job.run(DELETED)
        await job.rounds(2)
        assert not job.stopped.is_set(), "nothing says so"
        job.free -= 65 * MIB
        await job.wait_stopped()
    assert guard.exceeded == (
        "disk limit of 1 MB exceeded (3 MB in 1 file, 1 of them deleted but in use)"
    )


async def test_the_table_of_a_single_thread_is_seen(job: Job) -> None:
    """A thread may leave the process's table of open files for one of its own."""
    program = """
import ctypes, os, threading
ready = threading.Event()
def hide():
    assert ctypes.CDLL(None).unshare(0x400) == 0  # CLONE_FILES
    global f
    fd = os.open('x', os.O_RDWR | os.O_CREAT)
    os.unlink('x')
    os.write(fd, b'x' * (3 << 20))
    ready.set()
    threading.Event().wait()
threading.Thread(target=hide, daemon=True).start()
ready.wait()
"""
    with job.over() as guard:
        await job.run(program + FOREVER)
        job.free -= 65 * MIB
        await job.rounds(1)
        job.free -= 65 * MIB
        await job.wait_stopped()
    assert "1 of them deleted but in use" in guard.exceeded


async def test_deleted_files_are_looked_for_now_and_then(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the free space goes up and down: somebody else may make room meanwhile."""
    monkeypatch.setattr(diskwatch, "_ROUNDS_BETWEEN_LOOKS", 4)
    with job.over() as guard:
        await job.run(DELETED)
        await job.wait_stopped()
        assert "deleted but in use" in guard.exceeded


async def test_a_sparse_file_is_as_large_as_its_blocks(job: Job) -> None:
    with job.over() as guard:
        await job.run("f = open('x', 'wb', 0)\nf.truncate(1 << 40)\nf.write(b'x')" + FOREVER)
        await job.rounds()
        assert guard.exceeded == ""


async def test_names_without_end(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskcount, "MOST_ENTRIES", 500)
    with job.over() as guard:
        await job.run("print(flush=True)\nn = 0\nwhile True:\n n += 1\n open(str(n), 'w').close()")
        await job.wait_stopped()
    assert guard.exceeded == (
        "disk limit of 1 MB cannot be checked: there are more than 500 files and folders"
    )


async def test_open_files_without_end(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskcount, "MOST_OPEN", 100)
    with job.over() as guard:
        await job.run("f = [open('/dev/null') for _ in range(101)]" + FOREVER)
        await job.rounds(1)
        job.free -= 65 * MIB
        await job.wait_stopped()
    assert guard.exceeded.endswith("more than 100 files are open")


async def test_a_deep_tree(job: Job) -> None:
    with job.over() as guard:
        (job.folder / "1/2/3").mkdir(parents=True)
        (job.folder / "1/2/3/file").write_text("x")
        assert await guard.final() == ""
        (job.folder / "1/2/3/4").mkdir()
        assert (await guard.final()).endswith("folders are more than 3 levels deep")


async def test_hostile_names_and_kinds(job: Job, tmp_path: Path) -> None:
    """No link is followed, nothing is opened, and each file counts once."""
    (tmp_path / "large").write_bytes(b"x" * 2 * MIB)
    (job.folder / "link").symlink_to(tmp_path / "large")
    (job.folder / "out").symlink_to(tmp_path)
    os.mkfifo(job.folder / "pipe")
    (job.folder / "one").write_bytes(b"x" * 700_000)
    os.link(job.folder / "one", job.folder / "two")
    Path(os.fsdecode(os.fsencode(job.folder) + b"/\xff\n\x1b")).write_text("x")
    with job.over() as guard:
        assert await guard.final() == ""
        count = await job.watch.in_thread(guard.count)
        assert 700_000 <= count.held < MIB
        assert count.files == 5


async def test_a_tree_that_changes_while_it_is_counted(job: Job) -> None:
    program = """
import os
print(flush=True)
while True:
    os.mkdir('a'); open('a/x', 'w').close(); os.rename('a', 'b'); os.symlink('/', 'a')
    os.unlink('a'); open('a', 'w').close(); os.unlink('a'); os.unlink('b/x'); os.rmdir('b')
"""
    with job.over() as guard:
        await job.run(program)
        for _ in range(3000):
            assert (await job.watch.in_thread(guard.count)).trouble == ""


async def test_a_folder_that_cannot_be_read(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds is not known. Its name is not told: the job has chosen it."""
    (job.folder / "evil").mkdir()
    with job.over() as guard:
        open_file = os.open

        def refuse(path: str, flags: int, **options: int) -> int:
            if path == "evil":
                raise PermissionError(13, "Permission denied", path)
            return open_file(path, flags, **options)

        monkeypatch.setattr(os, "open", refuse)
        assert await guard.final() == (
            "disk limit of 1 MB cannot be checked: the job's folder cannot be read: "
            "Permission denied"
        )


async def test_the_last_second_counts(job: Job) -> None:
    """A job that has ended by itself is judged, and not stopped."""
    job.watch._interval = 999
    with job.over() as guard:
        (job.folder / "x").write_bytes(b"x" * 2 * MIB)
        assert await guard.final() == "disk limit of 1 MB exceeded (2 MB in 1 file)"
    assert not job.stopped.is_set()


async def test_what_is_spared_and_what_lies_elsewhere(job: Job, tmp_path: Path) -> None:
    (job.folder / "input.mp4").write_bytes(b"x" * 3 * MIB)
    output = tmp_path / "main.out"
    with job.over(spared_bytes=3 * MIB + 8192, also=(output,)) as guard:
        assert await guard.final() == ""
        output.write_bytes(b"x" * 2 * MIB)
        assert await guard.final() == "disk limit of 1 MB exceeded (2 MB in 2 files)"


async def test_it_is_told_once(job: Job) -> None:
    calls = []
    (job.folder / "x").write_bytes(b"x" * 2 * MIB)
    with job.watch.over(
        job.folder, MIB, control_group=lambda: "", on_exceeded=lambda: calls.append(1)
    ):
        await job.rounds()
    assert calls == [1]


async def test_there_is_no_wake_up_without_a_job(job: Job) -> None:
    fds = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(2):
        with job.over(), job.over():
            assert job.watch._task is not None
        assert job.watch._task is None
    await job.watch.in_thread(lambda: None)  # after what was left to the thread
    assert set(os.listdir("/proc/self/fd")) == fds  # noqa: PTH208


async def test_a_look_that_fails_is_taken_again(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (job.folder / "x").write_bytes(b"x" * 2 * MIB)
    look = job.watch._look
    failures = iter([ZeroDivisionError])

    def fail_once(guards: list[tuple[DiskGuard, str]]) -> list[tuple[DiskGuard, Count]]:
        for failure in failures:
            raise failure
        return look(guards)

    monkeypatch.setattr(job.watch, "_look", fail_once)
    with job.over():
        await job.wait_stopped()
    assert "the look at the jobs' folders failed" in caplog.text


async def test_a_folder_that_is_not_there(job: Job) -> None:
    job.folder.rmdir()
    with pytest.raises(JobError, match=r"cannot watch the folder .*/files: No such file"):
        job.over().__enter__()


def test_what_a_disk_has_lost() -> None:
    disk = _Disk()
    lost: Callable[[int, int], bool] = lambda free, grown: disk.has_lost(free * MIB, grown * MIB)  # noqa: E731
    assert not lost(1000, 0)
    assert not lost(900, 100), "the folders have it"
    assert not lost(860, 0)
    assert lost(830, 0), "little by little"
    assert not lost(800, 0), "from the start"
    assert not lost(900, 0)
    assert lost(830, 0), "room that others make does not count ahead"
