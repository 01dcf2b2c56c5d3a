"""The watchdog: an agent that hangs is replaced, one that waits or is only slow is not."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Worker, parameters, running, sh, until
from tests.e2e.surroundings import drop_in, inside
from tests.e2e.test_durable import starts
from tests.e2e.test_ledger import LONGER
from tests.fakes.master import FakeMaster
from tests.slowness import SLOWNESS

BLOCKS = """\
import signal, time
signal.signal(signal.SIGUSR2, lambda *_: time.sleep(1000))
"""
IMPATIENT = """\
import worker.dispatch, worker.master.session, worker.agent
worker.master.session.DEAD_AFTER = 1.0
worker.agent.REQUEST_SEC = worker.dispatch.REQUEST_SEC = 2.0
"""


@pytest.fixture(autouse=True)
def quick_watchdog() -> Iterator[None]:
    with drop_in(f"WatchdogSec={2 * SLOWNESS:g}s"):
        yield


def test_an_agent_that_hangs_is_replaced_and_its_job_runs_on(
    worker: Worker, master: FakeMaster, tmp_path: Path
) -> None:
    """All of it is stopped; then its event loop alone waits in a call that does not return."""
    worker.start(master, PYTHONPATH=inside(tmp_path, BLOCKS))
    job = master.submit(LONGER)
    unit = running(job["id"])

    def replaced() -> int:
        return worker.log().count(f"following {unit}, started earlier")

    os.kill(int(worker.show("MainPID")), signal.SIGSTOP)
    until(lambda: replaced() == 1)
    os.kill(int(worker.show("MainPID")), signal.SIGUSR2)
    until(lambda: replaced() == 2)

    assert worker.log().count("Watchdog timeout") == 2
    assert worker.show("NRestarts") == "2"
    ended = master.wait(job["id"], timeout=60)
    assert ended["status"] == "completed", ended
    assert len(master.results) == 1
    assert starts(job["id"]) == 1


def test_an_agent_that_waits_for_its_master_is_not_stuck(worker: Worker, tmp_path: Path) -> None:
    """Its master is away for so long that the node must register again."""
    with FakeMaster() as master:
        worker.start(master, PYTHONPATH=inside(tmp_path, IMPATIENT))
        until(lambda: worker.ready()[0] == 200)
    until(lambda: "registering again" in worker.log())
    # Longer than any promise of a loop, and then the time of the watchdog.
    sh("sleep", str(3 + 3 * SLOWNESS))

    assert "stuck: " not in worker.log()
    assert worker.show("NRestarts") == "0"


def test_a_busy_machine_is_no_reason(worker: Worker, master: FakeMaster) -> None:
    worker.start(master)
    hogs = [
        subprocess.Popen(["sh", "-c", "while :; do :; done"])
        for _ in range(4 * (os.cpu_count() or 1))
    ]
    try:
        job = master.submit(parameters())
        assert master.wait(job["id"], timeout=90)["status"] == "completed"
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert worker.show("NRestarts") == "0"
