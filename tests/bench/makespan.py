"""Jobs of about a second, two at a time, against the same commands in a plain loop."""

from __future__ import annotations

import asyncio
import queue
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from tests.bench.harness import Bench, in_turns
from tests.bench.service import Service, make_media
from tests.fakes.master import FakeMaster
from worker.config.settings import Settings
from worker.jobs import ffmpeg
from worker.jobs.parse import parse_job
from worker.jobs.policy import Policy
from worker.master.wire import Job
from worker.node.facts import gather

JOBS = 8
WORKERS = 2
_SIZE = "1280x720"


def run(bench: Bench) -> None:
    bench.begin("makespan", f"chunks of {JOBS} jobs, {WORKERS} at a time, as a ratio")
    capabilities = asyncio.run(gather()).capabilities
    source = bench.folder / "source.mp4"
    policy = Policy(input_dirs=(bench.folder,), output_dirs=(bench.folder,))
    seconds = 2.0
    make_media(source, seconds=seconds, size=_SIZE, rate=30)

    def request(number: int) -> dict[str, Any]:
        output = bench.folder / f"out-{number}.mp4"
        return {"scenario": "bench", "parameters": {"input": str(source), "output": str(output)}}

    def commands(number: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What the service runs for that job, by the same functions."""
        job = Job.model_validate({"id": "bench", **request(number)})
        spec = parse_job(job, capabilities, Settings().defaults, generate_input=True, policy=policy)
        assert isinstance(spec.output, Path)
        return (
            ffmpeg.transcode_command(spec, shutil.which("ffmpeg") or "", source, spec.output),
            ffmpeg.probe_command(shutil.which("ffprobe") or "", spec.output),
        )

    todo = [commands(number) for number in range(JOBS)]
    plain_loop(todo, bench.folder)
    took = plain_loop(todo, bench.folder) * WORKERS / JOBS
    seconds = min(30.0, max(0.2, seconds / took))
    make_media(source, seconds=seconds, size=_SIZE, rate=30)

    cpu: list[float] = []
    with (
        FakeMaster(max_retries=0) as master,
        Service(master, POLL_INTERVAL="200ms", MAX_CONCURRENT_JOBS=WORKERS) as service,
    ):

        def service_loop() -> float:
            before = service.cpu_seconds
            makespan = through_the_master(master, [request(n) for n in range(JOBS)])
            cpu.append(1000 * (service.cpu_seconds - before) / JOBS)
            return makespan

        spans = in_turns(
            {"service": service_loop, "plain loop": lambda: plain_loop(todo, bench.folder)},
            bench.pick(11, 3),
        )
    for name, values in spans.items():
        bench.add(f"{name}, {JOBS} jobs", values, "s")
    bench.compare("makespan", spans, "service", "plain loop", most=1.15)
    bench.add("CPU time of the agent per job", cpu[1:], "ms", most=15)
    bench.note("from the first job's hand-out to the last result: the wait for the poll is in")
    bench.note("`latency`. The plain loop has no limits, log, atomic output or report.")


def through_the_master(
    master: FakeMaster, requests: list[dict[str, Any]], timeout: float = 300
) -> float:
    """Seconds from the first job's hand-out to the last result. All must complete."""
    before = len(master.results)
    jobs = [master.submit(request)["id"] for request in requests]
    first = master.store.jobs[jobs[0]]
    master.wait_for(lambda: first["status"] not in ("pending", "queued"), timeout, "a poll")
    begun = time.perf_counter()
    done = before + len(jobs)
    master.wait_for(lambda: len(master.results) >= done, timeout, "the results")
    seconds = time.perf_counter() - begun
    for result in master.results[before:]:
        if result["status"] != "completed":
            raise RuntimeError(f"a job failed: {result.get('error')}")
    return seconds


def plain_loop(todo: list[tuple[tuple[str, ...], tuple[str, ...]]], folder: Path) -> float:
    """Seconds for all of it by WORKERS threads that only run commands."""
    waiting: queue.SimpleQueue[tuple[tuple[str, ...], tuple[str, ...]]] = queue.SimpleQueue()
    for pair in todo:
        waiting.put(pair)
    statuses: list[int] = []

    def work(name: str) -> None:
        with (folder / name).open("wb") as output:
            while True:
                try:
                    pair = waiting.get_nowait()
                except queue.Empty:
                    return
                for command in pair:
                    done = subprocess.run(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.DEVNULL,
                    )
                    statuses.append(done.returncode)

    threads = [threading.Thread(target=work, args=(f"plain-{n}",)) for n in range(WORKERS)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    if len(statuses) != 2 * len(todo) or any(statuses):
        raise RuntimeError(f"the plain loop failed, exit statuses {statuses}: {todo[0]}")
    return seconds
