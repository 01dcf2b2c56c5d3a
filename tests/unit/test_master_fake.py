"""The demo master itself: a test against it is worth what it is faithful."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes import master as fake_module
from tests.fakes.master import FakeMaster
from tests.fakes.shapes import go_time
from tests.unit.clock import Clock

NODE = {
    "address": "https://box:80", "type": "server", "cpu_threads": 8, "cpu_model": "x",
    "has_gpu": False, "ram_total_bytes": 1 << 30,
}  # fmt: skip


@pytest.fixture
def master(clock: Clock) -> Iterator[FakeMaster]:
    with FakeMaster(clock=clock) as master:
        yield master


@pytest.fixture
def http(master: FakeMaster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=master.url, trust_env=False) as http:
        yield http


def register(http: httpx.Client, **fields: Any) -> str:
    node_id = http.post("/nodes/register", json={**NODE, **fields}).json()["id"]
    assert isinstance(node_id, str)
    return node_id


def take(http: httpx.Client, node_id: str) -> Any:
    return http.get("/jobs/next", params={"node_id": node_id}).json()["job"]


def report(http: httpx.Client, job_id: str, status: str, **fields: Any) -> httpx.Response:
    return http.post("/results", json={"job_id": job_id, "status": status, **fields})


def test_errors_are_text(http: httpx.Client) -> None:
    answer = http.get("/jobs/abc")
    assert (answer.status_code, answer.text) == (404, "Job not found\n")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    answer = http.get("/api/v1/jobs")
    assert (answer.status_code, answer.text) == (404, "404 page not found\n")
    answer = http.delete("/jobs")
    assert (answer.status_code, answer.content) == (405, b"")
    assert http.get("/tenants").status_code == 501


def test_the_key() -> None:
    with FakeMaster(api_key="k") as master, httpx.Client(base_url=master.url) as http:
        assert http.get("/health").json() == {"status": "healthy"}
        assert http.get("/nowhere").status_code == 404
        assert http.get("/jobs").text == "Missing Authorization header\n"
        assert http.get("/jobs", headers={"X-API-Key": "k"}).status_code == 401
        for wrong in ("Bearer x", "bearer k", "k"):
            answer = http.get("/jobs", headers={"Authorization": wrong})
            assert (answer.status_code, answer.text) == (401, "Invalid API key\n")
        assert http.get("/jobs", headers={"Authorization": "Bearer k"}).status_code == 200


def test_a_node_is_its_address_and_keeps_what_was_known(http: httpx.Client) -> None:
    first = http.post("/nodes/register", json=NODE)
    again = http.post("/nodes/register", json={**NODE, "cpu_threads": 16})
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    assert first.json()["name"] == "box"
    assert again.json()["cpu_threads"] == 16
    assert http.get(f"/nodes/{first.json()['id']}").json()["cpu_threads"] == 8


@pytest.mark.parametrize(
    "change", [{"gpu_capabilities": "nvenc"}, {"cpu_threads": "8"}, {"cpu_threads": True}]
)
def test_wrong_types_spoil_a_request(http: httpx.Client, change: dict[str, Any]) -> None:
    answer = http.post("/nodes/register", json={**NODE, **change})
    assert (answer.status_code, answer.text) == (400, "Invalid request body\n")
    assert http.post("/nodes/register", content=b"{").status_code == 400
    assert http.post("/nodes/register", content=b"[]").status_code == 400


def test_unknown_nodes(http: httpx.Client, master: FakeMaster) -> None:
    answer = http.post("/nodes/x/heartbeat")
    assert (answer.status_code, answer.text) == (404, "Node not found\n")
    answer = http.get("/jobs/next?node_id=x")
    assert (answer.status_code, answer.text) == (500, "Failed to get next job\n")
    assert http.get("/jobs/next").text == "node_id parameter is required\n"


def test_empty_lists_are_null(http: httpx.Client) -> None:
    assert http.get("/jobs").json() == {"count": 0, "jobs": None}
    assert http.get("/nodes").json() == {"count": 0, "nodes": None}


def test_a_heartbeat_has_no_body(http: httpx.Client) -> None:
    answer = http.post(f"/nodes/{register(http)}/heartbeat", content=b"whatever")
    assert (answer.status_code, answer.content) == (200, b"")


def test_the_order_of_jobs(http: httpx.Client, master: FakeMaster) -> None:
    kinds = [
        ("batch", "low"), ("default", "medium"), ("odd", "odd"), ("default", "high"),
        ("live", "low"), ("live", "high"),
    ]  # fmt: skip
    for queue, priority in kinds:
        http.post("/jobs", json={"scenario": "s", "queue": queue, "priority": priority})
    node = register(http)
    order = [take(http, node)["sequence_number"] for _ in kinds]
    assert order == [6, 5, 4, 2, 3, 1]
    assert take(http, node) is None


def test_a_gpu_job_at_the_head_holds_up_the_others(http: httpx.Client, master: FakeMaster) -> None:
    master.submit({"parameters": {"codec": "h264_nvenc"}})
    master.submit({})
    plain = register(http)
    assert take(http, plain) is None
    assert take(http, register(http, address="gpu", has_gpu=True))["sequence_number"] == 1
    assert take(http, plain)["sequence_number"] == 2


def test_ids_are_taken_for_numbers(http: httpx.Client, master: FakeMaster) -> None:
    for number in range(4):
        master.submit({"scenario": str(number)}, {"id": f"{number}a-b"})
    assert http.get("/jobs/4aa1a226").json()["scenario"] == "3"
    assert http.get("/jobs/2a-b").json()["scenario"] == "1"
    assert http.get("/jobs/43e5").status_code == 404
    assert http.get("/jobs/0a-b").json()["scenario"] == "0"
    assert http.get("/jobs/1/logs").json()["logs"] == "No logs available for this job"


def test_a_new_job(http: httpx.Client) -> None:
    request = {"scenario": "s", "classification": "production", "resource_limits": {"x": 1}}
    job = http.post("/jobs", json=request).json()
    assert "classification" not in job
    assert "resource_limits" not in job
    assert (job["engine"], job["queue"], job["priority"]) == ("auto", "default", "medium")
    answer = http.post("/jobs", json={"engine": "vlc"})
    assert answer.text.startswith("Invalid engine 'vlc'")
    assert http.post("/jobs", json={}).status_code == 201


def test_results_are_not_checked(http: httpx.Client, master: FakeMaster) -> None:
    job_id = master.submit({})["id"]
    assert report(http, job_id, "completed").json() == {"status": "success"}
    assert report(http, job_id, "completed").json() == {"status": "success"}
    for retry in (1, 2, 3):
        answer = report(http, job_id, "failed", error="boom").json()
        assert answer == {"max_retries": 3, "retry": retry, "status": "retrying"}
        assert master.job(job_id)["status"] == "pending"
    assert report(http, job_id, "failed").json() == {"status": "success"}
    assert master.job(job_id)["status"] == "failed"
    report(http, job_id, "bogus")
    assert master.job(job_id)["status"] == "bogus"
    assert len(master.results) == 7
    answer = report(http, "nothing", "completed")
    assert (answer.status_code, answer.text) == (500, "Failed to update job status\n")


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("2026-11-24T19:00:00Z", 200),
        ("2026-11-24T19:00:00.123456+00:00", 200),
        ("2026-11-24T19:00:00", 400),
        (5, 400),
    ],
)
def test_times_need_a_zone(http: httpx.Client, master: FakeMaster, value: Any, status: int) -> None:
    answer = report(http, master.submit({})["id"], "completed", completed_at=value)
    assert answer.status_code == status


def test_a_retry_loses_the_nodes_row(http: httpx.Client, master: FakeMaster) -> None:
    node = register(http)
    job_id = master.submit({})["id"]
    take(http, node)
    report(http, job_id, "failed")
    assert http.get(f"/nodes/{node}").status_code == 500
    assert http.get("/nodes").json()["nodes"] is None
    assert http.post(f"/nodes/{node}/heartbeat").status_code == 200
    renewed = http.post("/nodes/register", json=NODE)
    assert renewed.status_code == 201
    assert renewed.json()["id"] != node
    assert http.post(f"/nodes/{node}/heartbeat").status_code == 404


def test_taking_a_job_heals_the_row(http: httpx.Client, master: FakeMaster) -> None:
    node = register(http)
    job_id = master.submit({})["id"]
    take(http, node)
    report(http, job_id, "failed", error="boom")
    again = take(http, node)
    assert (again["id"], again["retry_count"], again["error"]) == (job_id, 1, "boom")
    assert http.get(f"/nodes/{node}").json()["status"] == "busy"
    assert http.delete(f"/nodes/{node}").status_code == 400


def test_pause_resume_cancel(http: httpx.Client, master: FakeMaster) -> None:
    node = register(http)
    master.submit({})
    assert http.post("/jobs/1/pause").status_code == 400
    take(http, node)
    assert http.post("/jobs/1/pause").json()["status"] == "paused"
    assert http.post("/jobs/1/resume").json()["status"] == "resumed"
    assert http.post("/jobs/1/cancel").json()["status"] == "canceled"
    answer = http.post("/jobs/1/cancel")
    assert answer.text == "Failed to cancel job: cannot cancel job in status: canceled\n"
    assert http.get(f"/nodes/{node}").json()["status"] == "available"
    assert http.post("/jobs/1/retry").json()["retry_count"] == 1


def test_a_dead_node_loses_its_jobs(http: httpx.Client, master: FakeMaster, clock: Clock) -> None:
    node = register(http)
    job_id = master.submit({})["id"]
    take(http, node)
    clock.now += 90
    master.store.tick()
    assert master.job(job_id)["status"] == "processing"
    clock.now += 1
    master.store.tick()
    job = master.job(job_id)
    assert (job["status"], job["retry_count"], job["node_id"]) == ("pending", 1, "")
    assert job["error"] == f"Reassigning from dead node: {node}"


def test_an_offline_node_stays_offline_until_it_registers(
    http: httpx.Client, master: FakeMaster, clock: Clock
) -> None:
    node = register(http)
    clock.now += 91
    master.store.tick()
    http.post(f"/nodes/{node}/heartbeat")
    assert http.get(f"/nodes/{node}").json()["status"] == "offline"
    assert register(http) == node
    assert http.get(f"/nodes/{node}").json()["status"] == "available"


def test_only_the_live_job_taken_last_is_kept_fresh(
    http: httpx.Client, master: FakeMaster, clock: Clock
) -> None:
    node = register(http)
    first, second = (master.submit({"queue": "live"})["id"] for _ in range(2))
    take(http, node)
    take(http, node)
    for _ in range(11):
        clock.now += 30
        http.post(f"/nodes/{node}/heartbeat")
    master.store.tick()
    assert master.job(first)["status"] == "pending"
    assert "stale" in master.job(first)["error"]
    assert master.job(second)["status"] == "processing"


def test_a_long_batch_job_is_queued_again(
    http: httpx.Client, master: FakeMaster, clock: Clock
) -> None:
    node = register(http)
    job_id = master.submit({"queue": "batch"})["id"]
    take(http, node)
    for _ in range(61):
        clock.now += 30
        http.post(f"/nodes/{node}/heartbeat")
    master.store.tick()
    assert (master.job(job_id)["status"], master.job(job_id)["retry_count"]) == ("pending", 1)


def test_some_words_in_an_error_queue_the_job_again() -> None:
    with FakeMaster(max_retries=0) as master, httpx.Client(base_url=master.url) as http:
        ids = [master.submit({})["id"] for _ in range(2)]
        report(http, ids[0], "failed", error="user_error: bad preset")
        report(http, ids[1], "failed", error="input_error: timeout in a name")
        master.store.tick()
        assert [master.job(i)["status"] for i in ids] == ["failed", "pending"]
        master.store.tick()
        assert master.job(ids[1])["status"] == "queued", "as no node is available"


@pytest.mark.parametrize(("seconds", "fraction"), [(1_700_000_000.0, ""), (1_700_000_000.5, ".5")])
def test_times_are_written_as_go_does(seconds: float, fraction: str) -> None:
    assert re.fullmatch(
        rf"2023-11-1\dT\d\d:\d\d:\d\d{re.escape(fraction)}(Z|[+-]\d\d:\d\d)", go_time(seconds)
    )


def test_waiting_for_a_job(master: FakeMaster, http: httpx.Client) -> None:
    job_id = master.submit({})["id"]
    with pytest.raises(TimeoutError, match="completed"):
        master.wait(job_id, timeout=0.01)
    thread = threading.Thread(target=report, args=(http, job_id, "completed"))
    thread.start()
    assert master.wait(job_id)["status"] == "completed"
    thread.join()


def test_faults_are_counted(master: FakeMaster, http: httpx.Client) -> None:
    master.fault("GET /jobs", "status", count=2, status=503, headers={"Retry-After": "3"})
    assert [http.get("/jobs").status_code for _ in range(3)] == [503, 503, 200]
    assert http.get("/nodes").status_code == 200
    master.fault("POST /jobs", "lose")
    with pytest.raises(httpx.RemoteProtocolError):
        http.post("/jobs", json={})
    assert len(master.store.jobs) == 1


def test_a_bug_in_the_fake_does_not_hide(monkeypatch: pytest.MonkeyPatch) -> None:
    master = FakeMaster()
    monkeypatch.setattr(master.store, "job_list", lambda: object())
    master.__enter__()
    with httpx.Client(base_url=master.url) as http, pytest.raises(httpx.RemoteProtocolError):
        http.get("/jobs")
    with pytest.raises(AssertionError, match="demo master itself"):
        master.__exit__(None, None, None)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_as_a_program(tmp_path: Path, stop: signal.Signals) -> None:
    key = tmp_path / "key"
    key.write_text("k\n")
    program = subprocess.Popen(
        [sys.executable, fake_module.__file__, "--port", "0", "--api-key-file", str(key)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    with program:
        assert program.stdout is not None
        url = program.stdout.readline().strip()
        answer = httpx.post(
            f"{url}/jobs", content=json.dumps({}), headers={"Authorization": "Bearer k"}
        )
        program.send_signal(stop)
        assert program.wait(10) == 0
    assert answer.status_code == 201
