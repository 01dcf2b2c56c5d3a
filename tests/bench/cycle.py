"""One unit of /bin/true: start to verdict, and the full cycle until it is unloaded again."""

from __future__ import annotations

import asyncio
import functools
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.harness import Bench, in_turns
from tests.bench.launches import Wire, as_a_job, limits_only, observe, systemd_run
from tests.bench.minimal import MinimalLoop
from worker.systemd.launch import Launch
from worker.systemd.launcher import Launcher


@dataclass(frozen=True)
class Chunk:
    """Milliseconds per cycle, as the mean over some cycles."""

    verdict: float
    full: float


Contender = Callable[[], Chunk]


def run(bench: Bench) -> None:
    bench.begin("cycle", "one unit of /bin/true after the other")
    for what, launch in (
        ("limits only", limits_only(bench.folder)),
        ("as a job", as_a_job(bench.folder)),
    ):
        wire, calls, _ = asyncio.run(observe(launch))
        count = bench.pick(30, 6)
        contenders: dict[str, Contender] = {
            "ours": functools.partial(ours, launch, count),
            "minimal": functools.partial(minimal, launch, wire, count),
            "systemd-run": SystemdRun(launch, wire, count),
            "ours + usage": functools.partial(ours, launch, count, usage=True),
        }
        chunks = in_turns(contenders, bench.pick(15, 3))
        full = {name: [chunk.full for chunk in found] for name, found in chunks.items()}
        verdict = {name: [chunk.verdict for chunk in found] for name, found in chunks.items()}
        for name in contenders:
            bench.add(f"{what}: {name}, full cycle", full[name], "ms")
        for name in ("ours", "minimal"):
            bench.add(f"{what}: {name}, to the verdict", verdict[name], "ms")
        bench.compare(f"{what}, to the verdict", verdict, "ours", "minimal")
        bench.compare(f"{what}, full", full, "ours", "minimal", most=1.2)
        bench.compare(f"{what}, full", full, "ours", "systemd-run", most=1.15)
        bench.compare(f"{what}, full", full, "minimal", "systemd-run")
        bench.note(f"{what}: our D-Bus calls are {', '.join(calls)}")
        _, missing = systemd_run(wire, "x")
        if missing:
            bench.note(f"{what}: systemd-run goes without {', '.join(missing)}")
    bench.note("systemd-run: a new process and connection each time; the unit unloads by itself,")
    bench.note("without RemainAfterExit=, and nobody waits until it has")


def ours(launch: Launch, count: int, *, usage: bool = False) -> Chunk:
    """Our launcher; with ``usage`` also what a job's usage is made of, as a job asks for it."""

    async def work() -> Chunk:
        launcher = Launcher()
        await launcher.connect()
        verdicts, cycles = [], []
        for _ in range(count):
            begun = time.perf_counter()
            unit = await launcher.start(launch)
            if usage:
                unit.sample()
            state = await unit.finished()
            verdicts.append(time.perf_counter() - begun)
            if (state.exec_main_code, state.exec_main_status) != (1, 0):
                raise RuntimeError(f"{launch.unit}: {state}")
            if usage:
                await unit.usage()
            await unit.reap()
            cycles.append(time.perf_counter() - begun)
        await launcher.close()
        return _chunk(verdicts, cycles)

    _empty(launch.stdout)
    return asyncio.run(work())


def minimal(launch: Launch, wire: Wire, count: int) -> Chunk:
    async def work() -> Chunk:
        loop = MinimalLoop(launch.unit)
        await loop.open()
        cycles = [await loop.cycle(wire) for _ in range(count)]
        loop.close()
        return _chunk([verdict for verdict, _ in cycles], [full for _, full in cycles])

    _empty(launch.stdout)
    return asyncio.run(work())


class SystemdRun:
    """Each cycle has a name of its own: the unit may outlive the command by a moment."""

    def __init__(self, launch: Launch, wire: Wire, count: int) -> None:
        self._launch, self._wire, self._count = launch, wire, count
        self._number = 0

    def __call__(self) -> Chunk:
        commands = []
        for _ in range(self._count):
            self._number += 1
            unit = self._launch.unit.replace(".service", f"-{self._number}.service")
            commands.append(systemd_run(self._wire, unit)[0])
        _empty(self._launch.stdout)
        cycles = []
        for command in commands:
            begun = time.perf_counter()
            pid = os.posix_spawn(command[0], command, os.environ)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            cycles.append(time.perf_counter() - begun)
            if status:
                raise RuntimeError(f"status {status} of {command}")
        # What systemd still has to do is not to slow down the next contender.
        subprocess.run(["systemctl", "daemon-reload"], check=True)
        return _chunk(cycles, cycles)


def _chunk(verdicts: list[float], cycles: list[float]) -> Chunk:
    return Chunk(1000 * statistics.fmean(verdicts), 1000 * statistics.fmean(cycles))


def _empty(path: Path) -> None:
    path.write_bytes(b"")
