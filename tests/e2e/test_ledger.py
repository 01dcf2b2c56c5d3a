"""The service with a ledger that cannot be used: no job is taken, none is lost, and it says why."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.conftest import SERVICE, WORK_DIR, Worker, job_units, parameters, running, sh, until
from tests.e2e.surroundings import drop_in
from tests.e2e.test_durable import invocation, kill, starts
from tests.fakes.master import FakeMaster

DISK = Path("/run/small")
# Long enough for an agent that tries again and again.
LONGER = {
    "scenario": "640x360p30-h264",
    "parameters": {"duration": 8, "resource_limits": {"max_cpu_percent": 12}},
}
AGAIN = "RestartSec=2s"


@pytest.fixture
def disk() -> Iterator[Path]:
    """A file system of 64 MB for the work directory."""
    DISK.mkdir()
    sh("mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "small", str(DISK))
    yield DISK
    sh("umount", str(DISK))
    DISK.rmdir()


def refused(worker: Worker, why: str) -> None:
    """The agent says why it does not start, and is tried again, not in a hurry."""
    until(lambda: "ffmpeg-worker: " in worker.log())
    assert f"ffmpeg-worker: {why}" in worker.log()
    until(lambda: worker.show("SubState") == "auto-restart")


def corrupt(path: Path) -> None:
    """All but the first page, part of which is in the log."""
    data = path.read_bytes()
    path.write_bytes(data[:1024] + b"?" * (len(data) - 1024))


def newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")


def lost(path: Path) -> None:
    """The file alone: what it says is in the log beside it."""
    path.unlink()


def test_a_ledger_that_cannot_be_used_is_refused_and_its_jobs_run_on(
    worker: Worker, master: FakeMaster, tmp_path: Path
) -> None:
    ledger, log = WORK_DIR / "ledger.db", WORK_DIR / "ledger.db-wal"
    damages: dict[Callable[[Path], None], str] = {
        corrupt: f"the ledger {ledger} is damaged: ",
        newer: f"the ledger {ledger} is of version 99, and this worker knows versions up to",
        lost: f"the ledger {ledger} is damaged: the file is missing, but its log is there; stop",
    }
    with drop_in(AGAIN):
        worker.start(master)
        job = master.submit(LONGER)
        unit = running(job["id"])
        before = invocation(unit)
        kill(worker)
        until(lambda: worker.show("SubState") == "auto-restart")
        waiting = master.submit(parameters())
        for path in (ledger, log):
            shutil.copy(path, tmp_path)

        for damage, why in damages.items():
            for path in (ledger, log):
                shutil.copy(tmp_path / path.name, path)
            damage(ledger)
            worker.cursor()
            refused(worker, why)
        restarts = int(worker.show("NRestarts"))
        assert restarts <= 6, "it hammers"
        assert master.job(waiting["id"])["status"] in ("pending", "queued")
        assert invocation(unit) == before

        for path in (ledger, log):
            shutil.copy(tmp_path / path.name, path)
        assert master.wait(job["id"], timeout=60)["status"] == "completed"
        assert starts(job["id"]) == 1
        assert master.wait(waiting["id"], timeout=30)["status"] == "completed"
        assert len(master.results) == 2


def test_a_ledger_that_was_lost_does_not_start_its_jobs_again(
    worker: Worker, master: FakeMaster
) -> None:
    """Its entries were still in the log when that was cut off. Nobody knows of the job but the
    master and systemd, so the unit is left alone."""
    worker.start(master)
    job = master.submit(LONGER)
    unit = running(job["id"])
    before = invocation(unit)
    kill(worker)
    os.truncate(WORK_DIR / "ledger.db-wal", 100)

    until(lambda: f"units of jobs that are not on record, left alone: {unit}" in worker.log())
    later = master.submit(parameters())

    assert master.wait(later["id"], timeout=30)["status"] == "completed"
    assert invocation(unit) == before
    assert starts(job["id"]) == 1
    assert [result["job_id"] for result in master.results] == [later["id"]]
    sh("systemctl", "stop", unit)
    sh("systemctl", "reset-failed", unit, check=False)
    shutil.rmtree(WORK_DIR / "jobs" / job["id"])


def fill(disk: Path) -> Path:
    """Leave no space at all; the file to remove for that to be over."""
    filler = disk / "filler"
    dd = ["dd", "if=/dev/zero", f"of={filler}", "bs=16k"]
    assert subprocess.run(dd, capture_output=True).returncode == 1
    return filler


def not_ready(worker: Worker, why: str) -> bool:
    status, answer = worker.ready()
    return status == 503 and why in json.dumps(answer)


def test_a_full_disk_holds_up_jobs_and_loses_none(
    worker: Worker, master: FakeMaster, disk: Path
) -> None:
    """While the agent runs, and when it starts."""
    with drop_in(f"ReadWritePaths={disk}\n{AGAIN}"):
        worker.start(master, WORK_DIR=str(disk), DEFAULT_DISK_MB="10")
        job = master.submit(LONGER)
        unit = running(job["id"])
        before = invocation(unit)

        filler = fill(disk)
        until(lambda: not_ready(worker, str(disk)))
        waiting = master.submit(parameters())
        until(lambda: "taking no jobs: " in worker.log())
        kill(worker)
        until(lambda: f"following {unit}, started earlier" in worker.log())
        until(lambda: not_ready(worker, str(disk)))
        assert invocation(unit) == before
        # ffmpeg has no space either, and the result none in the ledger; the master gets it.
        ended = master.wait(job["id"], timeout=60)
        assert ended["status"] == "failed"
        assert master.job(waiting["id"])["status"] in ("pending", "queued")

        filler.unlink()

        assert master.wait(waiting["id"], timeout=30)["status"] == "completed"
        until(lambda: not job_units())
        assert [result["job_id"] for result in master.results] == [job["id"], waiting["id"]]
        assert starts(job["id"]) == 1
        assert worker.show("NRestarts") == "1"


def test_a_work_directory_that_is_read_only_is_said_and_tried_again(
    worker: Worker, master: FakeMaster
) -> None:
    """As where WORK_DIR was moved and the unit was not told (ReadWritePaths=)."""
    folder = Path("/srv/elsewhere")
    folder.mkdir(mode=0o700)
    with drop_in(AGAIN):
        with pytest.raises(pytest.fail.Exception, match="control process exited"):
            worker.start(master, WORK_DIR=str(folder))
        refused(
            worker,
            f"cannot use the work directory {folder}: Read-only file system; make it writable or",
        )
    with drop_in(f"ReadWritePaths={folder}"):
        sh("systemctl", "start", SERVICE)
        job = master.submit(parameters())
        assert master.wait(job["id"], timeout=30)["status"] == "completed"
