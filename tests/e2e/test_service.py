"""The service through trouble: stops, crashes, masters that are down or talk nonsense."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import PROGRAM, WORK_DIR, Worker, job_units, parameters, running, sh, until
from tests.e2e.test_durable import SHORT
from tests.fakes.master import FakeMaster
from tests.slowness import SLOWNESS


def test_a_second_agent_keeps_its_hands_off(
    worker: Worker, master: FakeMaster, long_job: dict[str, Any], tmp_path: Path
) -> None:
    worker.start(master)
    job = master.submit(long_job)
    unit = running(job["id"])
    started = sh("systemctl", "show", "-p", "InvocationID", unit)

    def second(work_dir: Path) -> subprocess.Popen[str]:
        environment = os.environ | {
            "MASTER_URL": master.url,
            "NODE_NAME": "node-a",
            "METRICS_PORT": "0",
            "WORK_DIR": str(work_dir),
        }
        return subprocess.Popen([PROGRAM], env=environment, stderr=subprocess.PIPE, text=True)

    same = second(WORK_DIR)
    _, said = same.communicate(timeout=30 * SLOWNESS)
    assert same.returncode == 1
    assert "another worker uses the work directory" in said

    other = second(tmp_path)  # as the same node, in a directory of its own
    master.wait_for_request("GET /jobs", 2)  # the first agent has asked once, at its start
    before = len(master.seen("GET /jobs/next"))
    master.wait_for_request("GET /jobs/next", before + 10)
    other.terminate()
    _, said = other.communicate(timeout=30 * SLOWNESS)
    assert other.returncode == 0
    assert "left alone" in said
    assert sh("systemctl", "show", "-p", "InvocationID", unit) == started
    assert master.results == []
    worker.stop()
    assert [result["job_id"] for result in master.results] == [job["id"]]


def test_a_key_that_is_changed_later_is_told_and_not_hammered(worker: Worker) -> None:
    with FakeMaster(api_key="first-key-value") as master:
        worker.start(master, MASTER_API_KEY="first-key-value")
        until(lambda: worker.ready()[0] == 200)
        assert worker.metric("ffmpeg_worker_master_up") == 1

        master.api_key = "other"

        until(lambda: worker.ready()[0] == 503)
        assert "MASTER_API_KEY" in json.dumps(worker.ready()[1])
        until(lambda: "MASTER_API_KEY" in worker.show("StatusText"))
        assert worker.metric("ffmpeg_worker_master_up") == 0
        before = len(master.requests)
        time.sleep(2)  # ten polls
        assert len(master.requests) <= before + 1
        assert "first-key-value" not in worker.log()
        worker.stop()


def test_a_master_that_is_down_at_start_is_waited_for(worker: Worker) -> None:
    with FakeMaster() as reserved:
        port = reserved.port
        absent = reserved
    worker.start(absent)
    until(lambda: "cannot register" in worker.log())
    status, document = worker.ready()
    assert status == 503
    assert "not registered" in json.dumps(document)
    assert worker.show("ActiveState") == "active"

    with FakeMaster(port=port) as master:
        job = master.submit(parameters())
        assert master.wait(job["id"], timeout=60)["status"] == "completed"
        until(lambda: worker.ready()[0] == 200)
        worker.stop()


def test_a_wrong_key_is_said_and_not_hammered(worker: Worker) -> None:
    with FakeMaster(api_key="right") as master:
        worker.start(master, MASTER_API_KEY="wrong-key-value")
        until(lambda: "401" in worker.log() or "API key" in worker.log())
        time.sleep(2)  # long enough for ten polls, had they not been slowed down
        assert len(master.requests) <= 2
        assert worker.ready()[0] == 503
        assert "wrong-key-value" not in worker.log()
        worker.stop()


@pytest.mark.parametrize("kind", ["status", "garbage", "half", "drop", "lose"])
def test_faulty_answers_lose_no_job(worker: Worker, master: FakeMaster, kind: Any) -> None:
    worker.start(master)
    master.wait_for_request("GET /jobs/next")
    for route in ("GET /jobs/next", "POST /results", "POST /nodes/*/heartbeat"):
        master.fault(route, kind)
    jobs = [master.submit(parameters()) for _ in range(3)]

    for job in jobs:
        assert master.wait(job["id"], timeout=60)["status"] == "completed"

    worker.stop()
    assert len({result["job_id"] for result in master.results}) == 3
    assert worker.show("NRestarts") == "0"


def test_a_forgotten_node_registers_again(worker: Worker, master: FakeMaster) -> None:
    worker.start(master)
    master.wait_for_request("GET /jobs/next")
    with master.store.changed:
        master.store.nodes.clear()

    job = master.submit(parameters())

    assert master.wait(job["id"], timeout=30)["status"] == "completed"
    assert len(master.seen("POST /nodes/register")) >= 2


def test_a_restart_of_the_bus_does_not_disturb_a_job(worker: Worker, master: FakeMaster) -> None:
    worker.start(master)
    job = master.submit(SHORT)
    running(job["id"])

    sh("systemctl", "restart", "dbus.service")
    sh("systemctl", "daemon-reload")

    assert master.wait(job["id"], timeout=60)["status"] == "completed"
    assert len(master.results) == 1


def test_a_missing_ffmpeg_fails_the_job_and_says_so(
    worker: Worker, master: FakeMaster, tmp_path: Path
) -> None:
    worker.start(master, PATH=str(tmp_path))

    job = master.submit(parameters())

    assert master.wait(job["id"], timeout=30)["status"] == "failed"
    error = master.job(job["id"])["error"]
    assert error.startswith("platform_error: ")
    assert "ffmpeg" in error


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB for the work directory."""
    path = Path("/run/small")
    path.mkdir()
    sh("mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "small", str(path))
    yield path
    sh("systemctl", "stop", "ffmpeg-worker.service", check=False)
    sh("umount", str(path))
    path.rmdir()


def test_a_full_disk_takes_no_jobs_and_says_so(
    worker: Worker, master: FakeMaster, small_disk: Path
) -> None:
    drop_in = Path("/run/systemd/system/ffmpeg-worker.service.d/disk.conf")
    drop_in.parent.mkdir()
    drop_in.write_text(f"[Service]\nReadWritePaths={small_disk}\n")
    sh("systemctl", "daemon-reload")
    try:
        filler = small_disk / "filler"
        filler.write_bytes(bytes(62 * 2**20))
        worker.start(master, WORK_DIR=str(small_disk), DEFAULT_DISK_MB="10")
        master.wait_for_request("POST /nodes/register")
        job = master.submit(parameters())

        until(lambda: worker.ready()[0] == 503 and "disk" in json.dumps(worker.ready()[1]))
        time.sleep(1)
        assert master.job(job["id"])["status"] in ("pending", "queued")

        filler.unlink()
        assert master.wait(job["id"], timeout=30)["status"] == "completed"
        assert worker.ready()[0] == 200
    finally:
        worker.stop()
        drop_in.unlink()
        drop_in.parent.rmdir()
        sh("systemctl", "daemon-reload")


def test_one_live_job_at_a_time_and_taken_last(
    worker: Worker, master: FakeMaster, long_job: dict[str, Any]
) -> None:
    worker.start(master, MAX_CONCURRENT_JOBS="3")
    live = master.submit(long_job | {"queue": "live"})
    running(live["id"])
    other = master.submit(parameters())
    time.sleep(1)  # five poll intervals
    assert master.job(other["id"])["status"] in ("pending", "queued")

    sh("systemctl", "stop", f"ffmpeg-job-{live['id']}.service")

    assert master.wait(other["id"], timeout=30)["status"] == "completed"
    assert master.job(live["id"])["error"].startswith("platform_error: ")


PATHS = {"INPUT_DIRS": "/tmp", "OUTPUT_DIRS": "/tmp"}


class TestRun:
    """``ffmpeg-worker run JOB.json``"""

    def run(self, job: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        text = job if isinstance(job, str) else json.dumps(job)
        return subprocess.run(
            [PROGRAM, "run", "-"],
            input=text,
            capture_output=True,
            text=True,
            env=os.environ | PATHS | environment,
            timeout=120 * SLOWNESS,
        )

    @pytest.fixture(autouse=True)
    def _nothing_left(self) -> Iterator[None]:
        yield
        assert job_units() == []
        assert [path.name for path in WORK_DIR.glob("jobs/*")] == []

    def test_completed(self, tmp_path: Path) -> None:
        output = tmp_path / "out.mp4"
        done = self.run(parameters(output=str(output)))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["status"] == "completed"
        assert output.exists()

    def test_failed(self) -> None:
        done = self.run(parameters(codec="betamax"))
        assert done.returncode == 1
        assert json.loads(done.stdout)["metrics"]["failure_reason"] == "user_error"

    @pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"id": 7}'])
    def test_no_job(self, text: str) -> None:
        done = self.run(text)
        assert done.returncode == 2
        assert done.stdout == ""
        assert "Traceback" not in done.stderr

    def test_interrupted(self, long_job: dict[str, Any], tmp_path: Path) -> None:
        path = tmp_path / "job.json"
        path.write_text(json.dumps(long_job | {"id": "by-hand"}))
        process = subprocess.Popen(
            [PROGRAM, "run", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | PATHS,
        )  # fmt: skip
        until(
            lambda: (
                "active" in sh("systemctl", "is-active", "ffmpeg-job-by-hand", check=False).split()
            )
        )
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30 * SLOWNESS)
        assert process.returncode == 1, err
        assert json.loads(out)["status"] == "failed"
