"""The agent at work: CPU per job, many jobs, many units at a time. Jobs are stand-ins."""

from __future__ import annotations

import io
import pstats
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from tests.bench.harness import Bench
from tests.bench.makespan import through_the_master
from tests.bench.service import (
    CACHE,
    PYTHON,
    ROOT,
    Service,
    endless_programs,
    make_media,
    memory_mb,
    quick_programs,
)
from tests.fakes.master import FakeMaster

UNITS = 100
_PATIENCE_SEC = 300
Work = tuple[FakeMaster, Service, dict[str, Any]]
"""A master, the service registered with it, and the job that both are there for."""


def quick_jobs(bench: Bench, command: str = "") -> AbstractContextManager[Work]:
    """Jobs of next to no work, four at a time. ``command`` is the Service's."""
    media = _media(bench)
    programs = quick_programs(bench.folder, media)
    return _work(media, programs, command=command, POLL_INTERVAL="200ms", MAX_CONCURRENT_JOBS=4)


def endless_jobs(bench: Bench, count: int, command: str = "") -> AbstractContextManager[Work]:
    """Jobs that do not end by themselves, so many at a time. ``command`` is the Service's."""
    return _work(
        _media(bench),
        endless_programs(bench.folder),
        command=command,
        POLL_INTERVAL="3s",
        MAX_CONCURRENT_JOBS=count,
        DEFAULT_DISK_MB=1,
    )


def jobs(bench: Bench) -> None:
    """A thousand jobs whose ffmpeg only copies a file."""
    batch, batches = bench.pick((100, 10), (20, 3))
    bench.begin("jobs", f"{batch * batches} jobs of next to no work through the whole agent")
    rates, cpu, memory = [], [], []
    with quick_jobs(bench) as (master, service, request):
        through_the_master(master, [request] * 20)
        memory.append(memory_mb(service.pid)[0])
        for _ in range(batches):
            before = service.cpu_seconds
            seconds = through_the_master(master, [request] * batch)
            rates.append(batch / seconds)
            cpu.append(1000 * (service.cpu_seconds - before) / batch)
            memory.append(memory_mb(service.pid)[0])
    bench.add("jobs finished, 4 at a time", rates, "/s")
    bench.add("CPU time of the agent per job", cpu, "ms", most=15)
    half = len(cpu) // 2
    bench.add("… last half against first half", _mean(cpu[-half:]) / _mean(cpu[:half]), "x")
    bench.add("resident memory after 20 jobs", memory[0], "MB")
    bench.add(f"resident memory after {batch * batches} more", memory[-1], "MB")
    bench.add("… growth per 100 jobs in the last half", _growth(memory, half, batch), "kB")


def many(bench: Bench) -> None:
    """A hundred units that run, and one agent that follows them."""
    bench.begin("many", f"{UNITS} units running")
    _many(bench)


def _many(bench: Bench, command: str = "") -> None:
    loads, scrapes = [], []
    with endless_jobs(bench, UNITS, command) as (master, service, request):
        begun = time.monotonic()
        for _ in range(UNITS):
            master.submit(request)
        while (found := _running()) < UNITS:
            if time.monotonic() - begun > _PATIENCE_SEC:
                raise TimeoutError(f"{found} of {UNITS} units run after {_PATIENCE_SEC} s")
            time.sleep(0.2)
        bench.add(f"from nothing to {UNITS} units", time.monotonic() - begun, "s")
        time.sleep(2)  # their starts are over, and what they printed has been read
        for _ in range(bench.pick(6, 2)):
            before, start = service.cpu_seconds, time.monotonic()
            time.sleep(bench.pick(10, 5))
            loads.append(100 * (service.cpu_seconds - before) / (time.monotonic() - start))
        for _ in range(bench.pick(50, 10)):
            scrapes.append(1000 * service.scrape())
            time.sleep(0.05)
        bench.add("resident memory", memory_mb(service.pid)[0], "MB")
        begun = time.monotonic()
    bench.add(f"from SIGTERM to all {UNITS} reported", time.monotonic() - begun, "s")
    bench.add("CPU of the agent, of one core", loads, "%", most=None if command else 1)
    bench.add("scrape of /metrics", scrapes, "ms", most=None if command else 10)


def profile(bench: Bench) -> None:
    """Where the agent's CPU time goes during `jobs` and `many`, by cProfile."""
    bench.begin("profile", "where the agent's time goes (the profiler adds to all of it)")
    count = bench.pick(200, 40)
    stats = bench.folder / "agent.stats"
    path = f"{ROOT}:{CACHE['PYTHONPATH']}"
    command = f"/usr/bin/env PYTHONPATH={path} {PYTHON} -m tests.bench.profiled {stats}"
    with quick_jobs(bench, command) as (master, service, request):
        before = service.cpu_seconds
        through_the_master(master, [request] * count)
        bench.add("CPU time per job, profiled", 1000 * (service.cpu_seconds - before) / count, "ms")
    _show(stats, f"{count} jobs")
    shutil.rmtree(bench.folder / "programs")
    _many(bench, command)
    _show(stats, f"{UNITS} units")


def _media(bench: Bench) -> Path:
    return make_media(bench.folder / "media.mp4", seconds=1)


@contextmanager
def _work(media: Path, programs: Path, **options: Any) -> Iterator[Work]:
    with (
        FakeMaster(max_retries=0) as master,
        Service(master, programs=programs, **options) as service,
    ):
        yield master, service, {"scenario": "bench", "parameters": {"input": str(media)}}


def _show(stats: Path, title: str) -> None:
    for order, lines in (("cumulative", 90), ("tottime", 50)):
        text = io.StringIO()
        pstats.Stats(str(stats), stream=text).sort_stats(order).print_stats(lines)
        print(f"-- {title}, by {order}")
        print(text.getvalue().replace(f"{ROOT}/", "").replace(f"{sys.base_prefix}/lib/", ""))


def _running() -> int:
    listed = subprocess.run(
        ["systemctl", "list-units", "--plain", "--no-legend", "--state=running", "ffmpeg-job-*"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return len(listed.stdout.splitlines())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _growth(memory: list[float], half: int, batch: int) -> float:
    return 1024 * (memory[-1] - memory[-1 - half]) / half * 100 / batch
