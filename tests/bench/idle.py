"""What the service costs while there is nothing to do."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator

from tests.bench.harness import Bench
from tests.bench.service import BARE_IMPORTS, CACHE, PYTHON, Service, memory_mb
from tests.fakes.master import FakeMaster

BARE = f"{BARE_IMPORTS}; print('ready', flush=True); input()"


def run(bench: Bench) -> None:
    bench.begin("idle", "the service without jobs, POLL_INTERVAL=3s")
    rounds = bench.pick(3, 1)
    resident, proportional, bare_rss, bare_pss, loads = [], [], [], [], []
    for _ in range(rounds):
        with FakeMaster() as master, Service(master, POLL_INTERVAL="3s") as service:
            master.wait_for_request("GET /jobs/next", 2)  # the start is over
            before = service.cpu_seconds
            begun = time.monotonic()
            time.sleep(bench.pick(60, 10))
            loads.append(100 * (service.cpu_seconds - before) / (time.monotonic() - begun))
            # At the same time: the proportional size depends on who else has the same pages.
            with _bare() as bare:
                rss, pss = memory_mb(service.pid)
                resident.append(rss)
                proportional.append(pss)
                rss, pss = memory_mb(bare.pid)
                bare_rss.append(rss)
                bare_pss.append(pss)
    bench.add("service, resident (VmRSS)", resident, "MB")
    bench.add("bare imports, resident (VmRSS)", bare_rss, "MB")
    bench.compare(
        "resident", {"service": resident, "bare imports": bare_rss}, "service", "bare imports",
        most=1.4,
    )  # fmt: skip
    bench.add("service, proportional (Pss)", proportional, "MB")
    bench.add("bare imports, proportional (Pss)", bare_pss, "MB")
    bench.compare(
        "proportional", {"service": proportional, "bare imports": bare_pss}, "service",
        "bare imports", most=1.4,
    )  # fmt: skip
    bench.add(f"CPU over {bench.pick(60, 10)} s, of one core", loads, "%", most=0.1)


@contextlib.contextmanager
def _bare() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [PYTHON, "-W", "ignore", "-c", BARE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | CACHE,
        cwd="/",
    ) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("the libraries cannot be imported")
        yield process
        process.communicate(b"\n")
