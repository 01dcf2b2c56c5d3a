"""Processes that somebody else started, and the commands that limit them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Iterable
from pathlib import Path

from tests.system.commands import run, tried, until
from worker.systemd.processes import Processes

PYTHON = shutil.which("python3") or sys.executable
SLEEP = ("sleep", "300")
FAMILY = ("sh", "-c", "sleep 300 & sh -c 'sleep 301 & wait' & wait")
FAMILY_SIZE = 4
LOOK = Processes()
UNITS = ("ffmpeg-job-*", "ffmpeg-detached-*")


def worker(*words: object) -> list[str]:
    return [sys.executable, "-m", "worker", *map(str, words)]


async def attach(pid: int, *flags: str) -> str:
    """What the command says."""
    return await run(*worker("attach", *flags, pid))


async def detach(pid: int) -> str:
    return await run(*worker("detach", pid))


async def refused(*command: str) -> str:
    """The one line that a command ends with that cannot be done."""
    status, output = await tried(*command)
    assert status == 1, output
    (line,) = output.splitlines()
    assert line.startswith("ffmpeg-worker: ")
    return line


async def units() -> list[str]:
    output = await run("systemctl", "list-units", "--all", "--plain", "-q", *UNITS)
    return [line.split()[0] for line in output.splitlines()]


async def no_units() -> None:
    async def none() -> bool:
        return not await units()

    await until(none)


def units_of(pids: Iterable[int]) -> set[str]:
    return {LOOK.unit(pid) for pid in pids}


def family(pid: int) -> set[int]:
    return {member.pid for member in LOOK.family(pid)}


def zombies(parent: int) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    found = [process for pid in pids if (process := LOOK.get(pid))]
    return [process.pid for process in found if process.parent == parent and process.ended]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def cpu_share(pids: Iterable[int], seconds: float = 3) -> float:
    """Cores used. Limits in these tests are so low that they bind on a busy machine too."""
    pids, begun = list(pids), time.monotonic()
    before = sum(map(cpu_seconds, pids))
    await asyncio.sleep(seconds)
    return (sum(map(cpu_seconds, pids)) - before) / (time.monotonic() - begun)


class Foreign:
    """Starts processes that know nothing of us."""

    def __init__(self) -> None:
        self._started: list[Process] = []

    async def start(self, *command: str, children: int = 1) -> Process:
        """Returns when so many processes of it run, itself included."""
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True
        )
        self._started.append(process)
        await until(lambda: len(family(process.pid)) >= children)
        return process

    async def end(self) -> None:
        for process in self._started:
            for pid in family(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await process.communicate()
