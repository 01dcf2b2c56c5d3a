"""A master that fails: what is waited out, what is given up, and after how long."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.fakes.transport import client_of
from tests.unit.delivery.bench import Bench, Waits, steady
from worker.errors import MasterRefused, MasterUnreachable, Unauthorized
from worker.master.delivery import Delivered, Delivery, Dropped, TryAgain, deliver
from worker.master.retry import Backoff
from worker.master.wire import Job, JobResult


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 404, 418])
async def test_errors_that_pass_are_waited_out(bench: Bench, status: int) -> None:
    bench.master.fault(
        "POST /results", "status", status=status, count=2, headers={"Retry-After": "40"}
    )
    waits = Waits()
    backoff = Backoff(1.0, 60.0, uniform=steady)
    outcome = await bench.deliver(sleep=waits, backoff=backoff)
    assert isinstance(outcome, Delivered)
    assert waits.seconds == [41.0, 42.0]
    assert len(bench.master.seen("GET /jobs/1")) == 3


async def test_an_error_after_the_change_was_made(bench: Bench) -> None:
    """A proxy answers 504 though the master behind it has done its work."""
    bench.master.fault("POST /results", "status", status=504)
    waits = Waits(lambda: bench.master.store.result({"job_id": bench.job.id, "status": "failed"}))
    outcome = await bench.deliver("failed", sleep=waits)
    assert outcome == Delivered(None)
    assert bench.master.job(bench.job.id)["retry_count"] == 1


async def test_a_job_that_vanishes_between_look_and_post(bench: Bench) -> None:
    bench.master.fault("POST /results", "status", body="Failed to update job status")
    waits = Waits(bench.master.store.jobs.clear)
    outcome = await bench.deliver(sleep=waits)
    assert isinstance(outcome, Dropped)
    assert "does not know" in outcome.why


@pytest.mark.parametrize("status", [400, 422])
async def test_a_report_that_is_not_understood_is_not_repeated(
    bench: Bench, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    bench.master.fault("POST /results", "status", status=status, body="Invalid request body")
    outcome = await bench.deliver()
    assert isinstance(outcome, Dropped)
    assert "Invalid request body" in outcome.why
    assert [r.levelname for r in caplog.records if "dropped" in r.message] == ["ERROR"]


@pytest.mark.parametrize("status", [409, 410])
async def test_a_report_that_is_not_wanted(bench: Bench, status: int) -> None:
    bench.master.fault("POST /results", "status", status=status, body="job is not yours")
    outcome = await bench.delivery().attempt()
    assert isinstance(outcome, Dropped)
    assert "not yours" in outcome.why


async def test_a_report_that_is_too_long_goes_without_its_log(bench: Bench) -> None:
    bench.master.fault("POST /results", "status", status=413, body="too large")
    result = bench.result(logs="much", error="e")
    outcome = await Delivery(bench.client, bench.job, result).attempt()
    assert isinstance(outcome, Delivered)
    assert [("logs" in r.json) for r in bench.master.seen("POST /results")] == [True, False]


async def test_a_report_that_is_too_long_without_a_log(bench: Bench) -> None:
    bench.master.fault("POST /results", "status", status=413, count=2)
    outcome = await Delivery(bench.client, bench.job, bench.result(logs="much")).attempt()
    assert isinstance(outcome, Dropped)
    assert bench.posts == 2


async def test_a_refused_key_is_tried_again_slowly(bench: Bench) -> None:
    bench.master.api_key = "changed"
    attempts = 6

    def restore() -> None:
        bench.master.api_key = None

    waits = Waits(*[lambda: None] * (attempts - 1), restore)
    slow = Backoff(30.0, 270.0, floor=30.0, uniform=steady)
    outcome = await bench.deliver(sleep=waits, slow=slow)
    assert isinstance(outcome, Delivered)
    assert waits.seconds == [60.0, 90.0, 150.0, 270.0, 300.0, 300.0]


async def test_kinds_of_trouble_come_back_as_values(bench: Bench) -> None:
    bench.master.fault("GET /jobs/1", "drop")
    bench.master.fault("GET /jobs/1", "garbage")
    bench.master.fault("GET /jobs/1", "status", status=403)
    delivery = bench.delivery()
    outcomes = [await delivery.attempt() for _ in range(3)]
    assert [type(o.error) for o in outcomes if isinstance(o, TryAgain)] == [
        MasterUnreachable,
        MasterRefused,
        Unauthorized,
    ]
    assert not delivery.maybe_landed
    assert bench.posts == 0


async def test_a_master_that_is_gone_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """A complaint at once, then one a minute, and no posts that could have landed."""
    now = 0.0
    failures = 10

    def handler(request: httpx.Request) -> httpx.Response:
        if len(waits) < failures:
            raise httpx.ConnectError("no")
        if request.method == "GET":
            return httpx.Response(200, json={"id": "j", "status": "processing", "node_id": "n"})
        return httpx.Response(200, json={"status": "success"})

    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal now
        waits.append(seconds)
        now += 10.0

    client = client_of(handler)
    job = Job(id="j", node_id="n")
    result = JobResult(job_id="j", node_id="n", status="failed")
    outcome = await deliver(client, job, result, sleep=sleep, clock=lambda: now)
    assert isinstance(outcome, Delivered)
    assert len(waits) == failures
    assert [r.levelname for r in caplog.records].count("WARNING") == 2


@pytest.mark.parametrize("kind", ["status", "garbage"])
async def test_a_look_up_that_never_works_does_not_keep_a_report_for_ever(
    bench: Bench, kind: Any
) -> None:
    bench.master.fault("GET /jobs/1", kind, count=100)
    waits = Waits()
    outcome = await bench.deliver("failed", sleep=waits)
    assert isinstance(outcome, Delivered)
    assert len(waits.seconds) == 5
    assert bench.posts == 1


async def test_a_busy_master_is_waited_for_however_often_it_says_so(bench: Bench) -> None:
    bench.master.fault("GET /jobs/1", "status", status=503, count=20)
    waits = Waits()
    outcome = await bench.deliver("failed", sleep=waits)
    assert isinstance(outcome, Delivered)
    assert len(waits.seconds) == 20
