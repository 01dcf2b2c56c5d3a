"""What it costs that no job is lost: taking over from another agent, the disk, and memory."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from tests.bench.harness import Bench
from tests.bench.load import endless_jobs, quick_jobs
from tests.bench.makespan import through_the_master
from tests.bench.service import SERVICE, Service, memory_mb, sh

FOLLOWED = 100
LEDGER = Path("/var/lib/ffmpeg-worker/ledger.db")
_PATIENCE_SEC = 120
_BEGUN = re.compile("Process started with PID")
_FOLLOWING = re.compile("following .*, started earlier")


def adopt(bench: Bench) -> None:
    """A new agent is there: how long until it follows each job of the one before."""
    count = bench.pick(FOLLOWED, 10)
    bench.begin("adopt", f"{count} jobs run on while the agent is replaced")
    waits: dict[str, list[float]] = {"restart": [], "kill -9": []}
    first: list[float] = []
    with endless_jobs(bench, count) as (master, service, request):
        for _ in range(count):
            master.submit(request)
        _lines(service.pid, _BEGUN, count)
        for _ in range(bench.pick(5, 1)):
            for how, found in waits.items():
                sh("systemctl", "reset-failed", SERVICE)  # starts are limited, as they count
                if how == "restart":
                    sh("systemctl", "restart", SERVICE)
                else:
                    sh("systemctl", "kill", "--kill-whom=main", "--signal=KILL", SERVICE)
                    while _show("ActiveState") != "failed":
                        time.sleep(0.01)
                    sh("systemctl", "start", SERVICE)
                service.pid = int(_show("MainPID"))
                begun = int(_show("ExecMainStartTimestampMonotonic"))
                stamps = _lines(service.pid, _FOLLOWING, count)
                first.append((min(stamps) - begun) / 1e6)
                found.append((max(stamps) - begun) / 1e6)
    bench.add("new agent executed to first job followed", first, "s")
    for how, found in waits.items():
        bench.add(f"{how}: new agent executed to all {count} followed", found, "s", most=1)


def disk(bench: Bench) -> None:
    """What the agent writes for a job, and how much of it stays."""
    count = bench.pick(200, 20)
    bench.begin("disk", f"bytes written by the agent, {count} jobs of next to no work")
    with quick_jobs(bench) as (master, service, request):
        through_the_master(master, [request] * 20)
        _settled(service)
        before, stored = _written(service.pid), LEDGER.stat().st_size
        through_the_master(master, [request] * count)
        _settled(service)
        after = _written(service.pid)
        for name, unit in (("wchar", "handed to the kernel"), ("write_bytes", "sent to a disk")):
            bench.add(f"{unit}, per job", (after[name] - before[name]) / count / 1024, "kB")
        bench.add("writes, per job", (after["syscw"] - before["syscw"]) / count, "calls")
    # The log of the ledger is in its file by now.
    bench.add("growth of the ledger, per job", (LEDGER.stat().st_size - stored) / count, "B")
    bench.note("sent to a disk: 0 where the work directory is in memory, as in the bed")


def growth(bench: Bench) -> None:
    """Memory after thousands of jobs, most of which are over."""
    batch, batches = bench.pick((500, 10), (50, 3))
    bench.begin("growth", f"memory over {batch * batches} jobs of next to no work")
    memory: list[float] = []
    with quick_jobs(bench) as (master, service, request):
        for _ in range(batches):
            through_the_master(master, [request] * batch, timeout=900)
            _settled(service)
            memory.append(memory_mb(service.pid)[0])
            bench.note(f"after {len(memory) * batch} jobs: {memory[-1]:.2f} MB resident")
    bench.add(f"resident memory after {batch} jobs", memory[0], "MB")
    bench.add(f"resident memory after {batch * batches} jobs", memory[-1], "MB")
    half = len(memory) // 2
    grown = 1024 * (memory[-1] - memory[-1 - half]) / (half * batch / 1000)
    bench.add("growth per 1,000 jobs in the last half", grown, "kB", most=512)
    bench.note("170 kB of it are the acceptances that a session remembers, up to 10,000 of them")


def _show(name: str) -> str:
    return sh("systemctl", "show", SERVICE, "-p", name, "--value").strip()


def _lines(pid: int, wanted: re.Pattern[str], count: int) -> list[int]:
    """When ``pid`` wrote the lines of that kind, by the monotonic clock in microseconds."""
    deadline = time.monotonic() + _PATIENCE_SEC
    while True:
        text = sh("journalctl", "--no-pager", "-o", "json", f"_PID={pid}")
        entries = map(json.loads, text.splitlines())
        stamps = [int(e["__MONOTONIC_TIMESTAMP"]) for e in entries if wanted.search(e["MESSAGE"])]
        if len(stamps) >= count:
            return stamps
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(stamps)} of {count} jobs after {_PATIENCE_SEC} s")
        time.sleep(0.3)


def _settled(service: Service) -> None:
    """Return when the agent has put the last job away: it does nothing for a while then."""
    deadline = time.monotonic() + _PATIENCE_SEC
    before = _written(service.pid)
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = _written(service.pid)
        if now["wchar"] == before["wchar"]:
            return
        before = now
    raise TimeoutError(f"the agent still writes after {_PATIENCE_SEC} s")


def _written(pid: int) -> dict[str, int]:
    """The counters of /proc/PID/io, proc_pid_io(5)."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}
