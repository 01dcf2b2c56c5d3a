"""A single job from its submission to its result, at several poll intervals."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from tests.bench.harness import Bench
from tests.bench.service import Service, make_media
from tests.fakes.master import FakeMaster

INTERVALS = (0.2, 1.0, 3.0)


def run(bench: Bench) -> None:
    bench.begin("latency", "one small job, submitted to completed")
    source = make_media(bench.folder / "source.mp4", seconds=1)
    request: dict[str, Any] = {"scenario": "bench", "parameters": {"input": str(source)}}
    for interval in INTERVALS:
        count = bench.pick(16, 3)
        totals, works = [], []
        with (
            FakeMaster(max_retries=0) as master,
            Service(master, POLL_INTERVAL=f"{round(interval * 1000)}ms"),
        ):
            master.wait(master.submit(request)["id"])
            # Submissions spread evenly over the time between two polls, in any order.
            for phase in random.sample(range(count), count):
                time.sleep(interval * (phase + 0.5) / count)
                polled, done = _one(master, request)
                totals.append(done)
                works.append(done - polled)
        bench.add(f"poll interval {interval:g} s: submitted to completed", totals, "s")
        bench.add(f"poll interval {interval:g} s: … mean", statistics.fmean(totals), "s")
        bench.add(f"poll interval {interval:g} s: handed out to completed", works, "s")
        share = 100 * (1 - sum(works) / sum(totals))
        bench.add(f"poll interval {interval:g} s: share of the wait for the poll", share, "%")


def _one(master: FakeMaster, request: dict[str, Any]) -> tuple[float, float]:
    """Seconds from the submission until it was handed out, and until it was completed."""
    begun = time.perf_counter()
    job = master.store.jobs[master.submit(request)["id"]]
    master.wait_for(lambda: job["status"] not in ("pending", "queued"), 30, "a poll")
    polled = time.perf_counter() - begun
    if master.wait(job["id"])["status"] != "completed":
        raise RuntimeError(f"the job failed: {job.get('error')}")
    return polled, time.perf_counter() - begun
