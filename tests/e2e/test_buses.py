"""What a job is followed through: systemd, its bus, the master and the clock, each on the move."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.conftest import CONFIG, SERVICE, Worker, job_units, parameters, running, sh, until
from tests.e2e.surroundings import inside
from tests.e2e.test_durable import SHORT, invocation, kill, starts
from tests.fakes.master import FakeMaster
from tests.slowness import SLOWNESS

IMPATIENT = """\
import worker.systemd.launcher
worker.systemd.launcher.Launcher.__init__.__kwdefaults__["call_timeout"] = 2.0
"""
CLOCK = """\
import time
real, file = time.time, {file!r}
time.time = lambda: real() + float(open(file).read())
"""


@contextlib.contextmanager
def hung_bus() -> Iterator[None]:
    """The bus takes every message and answers none."""
    pid = int(sh("systemctl", "show", "-p", "MainPID", "--value", "dbus.service"))
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_bus_that_hangs(worker: Worker, master: FakeMaster, tmp_path: Path) -> None:
    """One job ends meanwhile, one is to be started, and calls run into their time limit."""
    worker.start(master, PYTHONPATH=inside(tmp_path, IMPATIENT))
    first = master.submit(SHORT)
    unit = running(first["id"])
    pid = sh("systemctl", "show", "-p", "MainPID", "--value", unit).strip()

    with hung_bus():
        second = master.submit(parameters())
        master.wait(second["id"], status=("processing",))
        until(lambda: not Path(f"/proc/{pid}").exists())
        time.sleep(4 * SLOWNESS)  # the time limit of two calls

    for job in (first, second):
        assert master.wait(job["id"], timeout=60)["status"] == "completed"
        assert starts(job["id"]) == 1
    assert len(master.results) == 2
    until(lambda: not job_units())
    assert worker.show("NRestarts") == "0"


def test_systemd_and_its_bus_are_upgraded_while_the_agent_is_replaced(
    worker: Worker, master: FakeMaster
) -> None:
    worker.start(master)
    job = master.submit(SHORT)
    unit = running(job["id"])
    before = invocation(unit)

    sh("systemctl", "daemon-reexec")
    sh("systemctl", "kill", "--signal=KILL", "dbus.service")
    sh("systemctl", "restart", SERVICE)
    sh("systemctl", "daemon-reexec")
    sh("systemctl", "daemon-reload")

    until(lambda: f"following {unit}, started earlier" in worker.log())
    sh("systemctl", "daemon-reexec")
    assert invocation(unit) == before
    assert master.wait(job["id"], timeout=60)["status"] == "completed"
    assert len(master.results) == 1
    assert starts(job["id"]) == 1
    until(lambda: not job_units())


def test_a_master_that_moved_gets_the_result_of_a_job_that_runs(
    worker: Worker, master: FakeMaster
) -> None:
    worker.start(master)
    job = master.submit(SHORT)
    unit = running(job["id"])
    with FakeMaster() as moved:
        moved.store = master.store
        CONFIG.write_text(CONFIG.read_text().replace(master.url, moved.url))

        sh("systemctl", "restart", SERVICE)

        until(lambda: f"following {unit}, started earlier" in worker.log())
        assert moved.wait(job["id"], timeout=60)["status"] == "completed"
        assert starts(job["id"]) == 1
        assert moved.seen("POST /results")
        assert not master.seen("POST /results")
        worker.stop()


def test_a_clock_that_is_set(worker: Worker, master: FakeMaster, tmp_path: Path) -> None:
    """By a year to and fro, while the agent is being replaced, and while it runs."""
    file = tmp_path / "seconds"
    file.write_text("0")
    worker.start(master, PYTHONPATH=inside(tmp_path, CLOCK.format(file=str(file))))
    job = master.submit(SHORT)
    unit = running(job["id"])

    file.write_text(str(-400 * 86400))
    kill(worker)
    until(lambda: f"following {unit}, started earlier" in worker.log())
    file.write_text(str(400 * 86400))

    assert master.wait(job["id"], timeout=60)["status"] == "completed"
    assert starts(job["id"]) == 1
    [result] = master.results
    assert 0 < result["metrics"]["transcode_duration_sec"] < 60 * SLOWNESS
    later = master.submit(parameters())
    assert master.wait(later["id"], timeout=30)["status"] == "completed"
