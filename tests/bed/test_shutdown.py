"""The worker as a service of a machine that is shut down, or loses its power, and boots again."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bed import Bed

from tests import accounts
from tests.fakes.master import FakeMaster
from tests.slowness import SLOWNESS

ROOT = Path(__file__).parents[2]
SERVICE = "ffmpeg-worker.service"
WORK_DIR = "/var/lib/ffmpeg-worker"


class Machine:
    """A bed with the service as it is shipped. Its work directory outlives each boot."""

    def __init__(self, folder: Path, master: FakeMaster) -> None:
        self._folder = folder
        self._config = "".join(
            f"{name}={value}\n"
            for name, value in {
                "MASTER_URL": master.url,
                "NODE_NAME": "node-a",
                "POLL_INTERVAL": "200ms",
                "HEARTBEAT_INTERVAL": "1s",
                "MAX_CONCURRENT_JOBS": "4",
                "METRICS_PORT": "0",
                "LOG_FILE": folder / "worker.log",
                "INPUT_DIRS": folder,
                "OUTPUT_DIRS": folder,
            }.items()
        )
        self.work_dir = folder / "work"
        self.work_dir.mkdir()
        self._bed: Bed | None = None

    def boot(self) -> None:
        self._bed = Bed(
            binds=[(str(self._folder), str(self._folder)), (str(self.work_dir), WORK_DIR)],
            host_network=True,
        )
        self._bed.up()
        self._bed.run(["systemd-sysusers", str(accounts.SYSUSERS)], check=True)
        for unit in (ROOT / "units").glob("*.s*ice"):
            text = unit.read_text()
            text = text.replace("/usr/local/bin", str(ROOT / ".venv/bin"))
            text = text.replace("UMask=", f"ReadWritePaths={self._folder}\nUMask=")
            self._write(f"/run/systemd/system/{unit.name}", text)
        self._write("/etc/ffmpeg-worker/config.env", self._config)
        self.systemctl("daemon-reload")
        self.systemctl("start", SERVICE)

    def _write(self, path: str, text: str) -> None:
        assert self._bed is not None
        command = ["sh", "-c", 'mkdir -p "${1%/*}" && cat > "$1"', "sh", path]
        self._bed.run(command, input=text, text=True, check=True, timeout=60)

    def systemctl(self, *words: str, check: bool = True) -> str:
        assert self._bed is not None
        done = self._bed.run(
            ["systemctl", *words], check=check, capture_output=True, text=True, timeout=60
        )
        return str(done.stdout).strip()

    def power_off(self) -> None:
        """Return when the machine is off, which it is before its services' time is up."""
        assert self._bed is not None
        pid = self._bed.pid
        self.systemctl("poweroff")
        until(lambda: not Path(f"/proc/{pid}").exists())
        self.cut()

    def cut(self) -> None:
        """What a power failure is: nobody has time for anything."""
        if self._bed is not None:
            self._bed.down()
            self._bed = None

    def log(self) -> str:
        return (self._folder / "worker.log").read_text()

    def ledger(self, statement: str, *values: object) -> list[Any]:
        """Read or change the ledger while the machine is off."""
        with closing(sqlite3.connect(self.work_dir / "ledger.db")) as db, db:
            return db.execute(statement, values).fetchall()


@pytest.fixture
def master() -> Iterator[FakeMaster]:
    with FakeMaster() as master:
        yield master


@pytest.fixture
def machine(tmp_path: Path, master: FakeMaster) -> Iterator[Machine]:
    machine = Machine(tmp_path, master)
    yield machine
    machine.cut()


@pytest.fixture
def long_job(tmp_path: Path) -> dict[str, Any]:
    """A job that runs for minutes if nobody stops it."""
    path = tmp_path / "in.mp4"
    source = "testsrc2=size=640x360:rate=30:duration=60"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-preset", "ultrafast"]
    subprocess.run([*command, "-pix_fmt", "yuv420p", str(path)], check=True)
    limits = {"max_cpu_percent": 5}
    return {"scenario": "whatever", "parameters": {"input": str(path), "resource_limits": limits}}


def until(what: Callable[[], Any], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout * SLOWNESS
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def running(machine: Machine, job: dict[str, Any]) -> None:
    unit = f"ffmpeg-job-{job['id']}.service"
    until(lambda: machine.systemctl("is-active", unit, check=False) == "active")


def test_a_machine_that_is_shut_down_hands_its_jobs_back(
    machine: Machine, master: FakeMaster, long_job: dict[str, Any]
) -> None:
    """At once, and as what it is: systemd ends the jobs' units while the worker is told to stop."""
    machine.boot()
    first, second = master.submit(long_job), master.submit(long_job)
    last = master.submit(long_job, {"max_retries": 0})
    for job in (first, second, last):
        running(machine, job)
    # The worker waits for this answer first, and meanwhile systemd has ended the jobs.
    before = len(master.seen("GET /jobs/next"))
    master.fault("GET /jobs/next", "hang", count=1000)
    master.wait_for_request("GET /jobs/next", before + 1)
    begun = time.monotonic()

    machine.power_off()

    assert time.monotonic() - begun < 30 * SLOWNESS
    assert {result["job_id"] for result in master.results} == {first["id"], second["id"]}
    for result in master.results:
        assert result["status"] == "failed"
        assert "the machine was shut down before the job was done" in result["error"]
    assert machine.log().count("left to the master") == 1
    assert machine.ledger("SELECT count(*) FROM entry WHERE settled = ''") == [(0,)]


def test_after_a_power_failure_the_jobs_are_reported_and_not_run_again(
    machine: Machine, master: FakeMaster, long_job: dict[str, Any]
) -> None:
    machine.boot()
    job = master.submit(long_job)
    running(machine, job)

    machine.cut()

    # The beds are all in one boot of one kernel.
    [(facts,)] = machine.ledger("SELECT facts FROM step")
    facts = json.dumps(json.loads(facts) | {"boot_id": "0b6a5b6e-8fd0-4bf0-9f3b-d0e4e4c4d9a1"})
    machine.ledger("UPDATE step SET facts = ?", facts)
    machine.boot()

    [result] = master.wait_for(lambda: master.results, 60)
    assert result["status"] == "failed"
    assert "the machine was restarted while" in result["error"]
    until(lambda: machine.ledger("SELECT count(*) FROM entry WHERE reaped_at > 0") == [(1,)])
