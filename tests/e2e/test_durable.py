"""No accepted job is lost and none runs twice: the agent dies, is restarted, stopped, steered."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import (
    PROGRAM,
    SERVICE,
    WORK_DIR,
    Worker,
    job_units,
    parameters,
    running,
    sh,
    until,
)
from tests.fakes.master import FakeMaster
from tests.slowness import SLOWNESS

# About five seconds: long enough for the agent to die and come back meanwhile. Where the processor
# is slow there is no need to hold the job back.
_CPU_PERCENT = 30 if SLOWNESS == 1 else 100
SHORT = {
    "scenario": "640x360p30-h264",
    "parameters": {"duration": 8, "resource_limits": {"max_cpu_percent": _CPU_PERCENT}},
}


def kill(worker: Worker) -> None:
    os.kill(int(worker.show("MainPID")), signal.SIGKILL)


def starts(job_id: str) -> int:
    """How often systemd started the job's transcode."""
    sh("journalctl", "--sync")
    unit = f"ffmpeg-job-{job_id}.service"
    lines = sh("journalctl", "-o", "cat", "_PID=1", f"UNIT={unit}", "-g", "^Started", check=False)
    return len(lines.splitlines())


def invocation(unit: str) -> str:
    return sh("systemctl", "show", "-p", "InvocationID", "--value", unit).strip()


@pytest.mark.parametrize("how", ["kill", "restart", "leave"])
def test_jobs_run_on_while_the_agent_is_replaced(
    worker: Worker, master: FakeMaster, how: str
) -> None:
    worker.start(master, STOP_MODE="leave")
    job = master.submit(SHORT)
    unit = running(job["id"])
    before = invocation(unit)
    asked = time.monotonic()

    if how == "kill":
        kill(worker)
    elif how == "restart":
        sh("systemctl", "restart", SERVICE)
    else:
        worker.stop()
        assert invocation(unit) == before, "nobody stopped it"
        sh("systemctl", "start", SERVICE)

    until(lambda: f"following {unit}, started earlier" in worker.log())
    assert time.monotonic() - asked < 10 * SLOWNESS
    assert invocation(unit) == before
    ended = master.wait(job["id"], timeout=60)
    assert ended["status"] == "completed", ended
    assert [result["status"] for result in master.results] == ["completed"]
    figures = master.results[0]["metrics"]
    assert figures["frames_encoded"] == 240
    assert figures["input_generation_duration_sec"] > 0
    assert starts(job["id"]) == 1


def test_what_ended_while_no_agent_ran_is_judged_and_reported(
    worker: Worker, master: FakeMaster
) -> None:
    worker.start(master, STOP_MODE="leave")
    job = master.submit(SHORT)
    unit = running(job["id"])
    worker.stop()
    until(lambda: sh("systemctl", "show", "-p", "SubState", "--value", unit).strip() == "exited")
    assert master.results == []

    sh("systemctl", "start", SERVICE)

    assert master.wait(job["id"], timeout=30)["status"] == "completed"
    assert len(master.results) == 1
    assert starts(job["id"]) == 1


def test_a_job_stopped_by_hand_while_no_agent_ran_is_reported_as_that(
    worker: Worker, master: FakeMaster, long_job: dict[str, Any]
) -> None:
    worker.start(master, STOP_MODE="leave")
    job = master.submit(long_job)
    unit = running(job["id"])
    worker.stop()
    sh("systemctl", "stop", unit)
    sh("systemctl", "reset-failed", unit, check=False)

    sh("systemctl", "start", SERVICE)

    ended = master.wait(job["id"], timeout=30)
    assert ended["status"] == "failed"
    assert f"{unit} was started before the worker was, and is gone" in ended["error"]
    assert starts(job["id"]) == 1


def test_a_killed_agent_answers_for_its_jobs_under_a_new_node_id_too(
    worker: Worker, master: FakeMaster
) -> None:
    worker.start(master)
    job = master.submit(SHORT)
    running(job["id"])
    with master.store.changed:
        [first] = master.store.nodes
        master.store.nodes[first]["current_job_id"] = None
    master.fault("GET /jobs", "status", count=1000)

    kill(worker)

    assert master.wait(job["id"], timeout=60)["status"] == "completed"
    assert list(master.store.nodes) != [first]
    assert len(master.results) == 1


def test_a_result_survives_the_death_of_the_agent(worker: Worker, master: FakeMaster) -> None:
    """The job was done, so it is reported completed, once, and not run again."""
    worker.start(master)
    master.fault("POST /results", "status", status=503, count=1000)
    job = master.submit(parameters())
    master.wait_for_request("POST /results")

    kill(worker)
    master.clear_faults()

    assert master.wait(job["id"], timeout=30)["status"] == "completed"
    assert len(master.results) == 1
    assert starts(job["id"]) == 1


def test_a_hand_out_whose_answer_was_lost_is_taken_up(worker: Worker, master: FakeMaster) -> None:
    worker.start(master, POLL_INTERVAL="1h")
    master.wait_for_request("GET /jobs/next")
    job = master.submit(parameters())
    master.fault("GET /jobs/next", "lose")
    sh("systemctl", "restart", SERVICE)
    until(lambda: master.job(job["id"])["status"] == "processing")
    kill(worker)

    assert master.wait(job["id"], timeout=30)["status"] == "completed"
    assert starts(job["id"]) == 1


def test_what_was_completed_during_an_outage_is_not_run_again(
    worker: Worker, master: FakeMaster
) -> None:
    worker.start(master)
    job = master.submit(SHORT)
    unit = running(job["id"])
    master.fault("*", "drop", count=10**6)
    until(lambda: unit not in job_units())
    with master.store.changed:  # what the master does when a node is silent for 90 s
        master.store._queue_again(master.store.jobs[job["id"]], "Reassigning from dead node")

    master.clear_faults()

    ended = master.wait(job["id"], timeout=60)
    assert (ended["status"], ended["retry_count"]) == ("completed", 1)
    assert [result["status"] for result in master.results] == ["completed"]
    assert starts(job["id"]) == 1


class TestStop:
    def test_what_ends_in_the_time_of_grace_is_reported_as_usual(
        self, worker: Worker, master: FakeMaster
    ) -> None:
        worker.start(master, STOP_GRACE=f"{60 * SLOWNESS:g}s")
        job = master.submit(SHORT)
        running(job["id"])

        worker.stop()

        assert [result["status"] for result in master.results] == ["completed"]
        assert job_units() == []
        assert worker.show("Result") == "success"

    def test_the_rest_is_handed_back_at_once(
        self, worker: Worker, master: FakeMaster, long_job: dict[str, Any]
    ) -> None:
        worker.start(master, STOP_GRACE="1s")
        job = master.submit(long_job)
        running(job["id"])
        master.fault("POST /results", "status", status=503, count=3)
        before = len(master.seen("POST /nodes/*/heartbeat"))

        worker.stop()

        [result] = master.results
        assert (result["job_id"], result["status"]) == (job["id"], "failed")
        assert "platform_error: the worker was stopped" in result["error"]
        assert job_units() == []
        assert worker.show("Result") == "success"
        assert len(master.seen("POST /nodes/*/heartbeat")) > before

    def test_a_last_retry_is_left_to_the_master(
        self, worker: Worker, master: FakeMaster, long_job: dict[str, Any]
    ) -> None:
        worker.start(master)
        job = master.submit(long_job, {"max_retries": 0})
        running(job["id"])

        worker.stop()

        assert master.results == []
        assert job_units() == []
        sh("systemctl", "start", SERVICE)
        until(lambda: "so that the master gives the jobs to others" in worker.log())
        assert "silent for" in worker.ready()[1]["reasons"][0]

    def test_draining_finishes_the_jobs_first(self, worker: Worker, master: FakeMaster) -> None:
        worker.start(master, STOP_MODE="drain", MAX_CONCURRENT_JOBS="1")
        job = master.submit(SHORT)
        running(job["id"])
        waiting = master.submit(parameters())
        before = len(master.seen("POST /nodes/*/heartbeat"))

        worker.stop()

        assert master.job(job["id"])["status"] == "completed"
        assert master.job(waiting["id"])["status"] in ("pending", "queued")
        assert len(master.seen("POST /nodes/*/heartbeat")) > before
        assert worker.show("Result") == "success"

    def test_a_second_signal_hurries(
        self, worker: Worker, master: FakeMaster, long_job: dict[str, Any]
    ) -> None:
        worker.start(master, STOP_MODE="drain")
        job = master.submit(long_job)
        running(job["id"])
        agent = int(worker.show("MainPID"))
        stopping = subprocess.Popen(["systemctl", "stop", SERVICE])
        until(lambda: "waiting for 1 jobs to end" in worker.log())

        os.kill(agent, signal.SIGTERM)

        assert stopping.wait(30 * SLOWNESS) == 0
        assert [result["status"] for result in master.results] == ["failed"]
        assert job_units() == []

    def test_a_stop_is_never_cut_short_by_systemd(
        self, worker: Worker, master: FakeMaster, long_job: dict[str, Any]
    ) -> None:
        worker.start(master)
        job = master.submit(long_job)
        running(job["id"])
        master.fault("*", "hang", count=10**6)
        begun = time.monotonic()

        worker.stop()

        assert time.monotonic() - begun < 45 * SLOWNESS
        assert worker.show("Result") == "success"
        assert job_units() == []

        master.clear_faults()
        sh("systemctl", "start", SERVICE)
        assert master.wait(job["id"], timeout=30)["error"].startswith("platform_error: ")
        assert len(master.results) == 1


def test_draining_by_command(worker: Worker, master: FakeMaster) -> None:
    def command(*words: str) -> str:
        return sh(str(PROGRAM), *words, "--work-dir", str(WORK_DIR))

    worker.start(master)
    job = master.submit(SHORT)
    running(job["id"])
    assert "1 job running" in command("drain")
    later = master.submit(parameters())
    command("drain", "--wait")
    assert master.job(job["id"])["status"] == "completed"
    sh("systemctl", "restart", SERVICE)
    until(lambda: "draining" in str(worker.ready()[1]))
    assert master.job(later["id"])["status"] in ("pending", "queued")

    command("undrain")

    assert master.wait(later["id"], timeout=30)["status"] == "completed"


def test_a_cancelled_job_is_stopped_and_not_reported(
    worker: Worker, master: FakeMaster, long_job: dict[str, Any], tmp_path: Path
) -> None:
    worker.start(master)
    target = tmp_path / "out.mp4"
    job = long_job | {"parameters": long_job["parameters"] | {"output": str(target)}}
    job = master.submit(job)
    running(job["id"])

    master.store.steer(str(job["sequence_number"]), "cancel")

    until(lambda: not job_units())
    until(lambda: worker.metric("ffrtmp_worker_jobs_canceled_total") == 1)
    assert master.results == []
    assert master.job(job["id"])["status"] == "canceled"
    assert list(tmp_path.iterdir()) == []
    assert worker.metric("ffrtmp_worker_active_jobs") == 0


def test_a_job_that_another_node_has_is_stopped(
    worker: Worker, master: FakeMaster, long_job: dict[str, Any]
) -> None:
    worker.start(master)
    job = master.submit(long_job)
    running(job["id"])

    with master.store.changed:
        master.store.jobs[job["id"]].update(node_id="another", retry_count=1)

    until(lambda: not job_units())
    assert master.results == []


def test_a_paused_job_holds_and_goes_on(worker: Worker, master: FakeMaster) -> None:
    worker.start(master)
    job = master.submit(SHORT)
    unit = running(job["id"])
    key = str(job["sequence_number"])
    master.store.steer(key, "pause")
    pid = sh("systemctl", "show", "-p", "MainPID", "--value", unit).strip()
    until(lambda: "State:\tT" in Path(f"/proc/{pid}/status").read_text())
    kill(worker)  # the next agent knows that it is paused
    until(lambda: f"following {unit}" in worker.log())

    master.store.steer(key, "resume")

    assert master.wait(job["id"], timeout=60)["status"] == "completed"
    assert starts(job["id"]) == 1
