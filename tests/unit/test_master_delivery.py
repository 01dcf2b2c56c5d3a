"""Reports that must arrive once: every state a job can be found in, and every way to fail."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest

from tests.fakes.master import FakeMaster
from worker.errors import MasterRefused, MasterUnreachable, Unauthorized
from worker.master.client import MasterClient
from worker.master.delivery import Delivered, Delivery, Dropped, TryAgain, deliver
from worker.master.retry import Backoff
from worker.master.wire import Job, JobResult, NodeRegistration

REGISTRATION = NodeRegistration(
    address="box", type="server", cpu_threads=8, cpu_model="x", has_gpu=False, ram_total_bytes=1
)


class Waits:
    """Stands in for sleeping; something may happen meanwhile."""

    def __init__(self, *meanwhile: Any) -> None:
        self.seconds: list[float] = []
        self._meanwhile = list(meanwhile)

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if self._meanwhile:
            self._meanwhile.pop(0)()


def steady(low: float, high: float) -> float:
    return high


class Bench:
    """A master with one job, taken by a node of ours."""

    def __init__(self, master: FakeMaster, client: MasterClient, job: Job, node_id: str) -> None:
        self.master = master
        self.client = client
        self.job = job
        self.node_id = node_id

    def result(self, status: str = "completed", **fields: Any) -> JobResult:
        return JobResult(job_id=self.job.id, node_id=self.node_id, status=status, **fields)

    def delivery(self, status: str = "completed", **options: Any) -> Delivery:
        return Delivery(self.client, self.job, self.result(status), **options)

    def set(self, **fields: Any) -> None:
        with self.master.store.changed:
            self.master.store.jobs[self.job.id].update(fields)

    @property
    def posts(self) -> int:
        return len(self.master.seen("POST /results"))


@pytest.fixture
async def bench() -> Any:
    with FakeMaster() as master:
        master.submit({"scenario": "720p30-h264"})
        async with MasterClient(base_url=master.url) as client:
            node = await client.register(REGISTRATION)
            job = await client.next_job(node.id)
            assert job is not None
            yield Bench(master, client, job, node.id)


async def test_a_completed_job(bench: Bench) -> None:
    outcome = await bench.delivery().attempt()
    assert isinstance(outcome, Delivered)
    assert outcome.answer is not None
    assert outcome.answer.status == "success"
    assert bench.master.job(bench.job.id)["status"] == "completed"


async def test_a_failed_job_is_queued_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    outcome = await bench.delivery("failed").attempt()
    assert isinstance(outcome, Delivered)
    assert outcome.answer is not None
    assert (outcome.answer.retry, outcome.answer.max_retries) == (1, 3)
    assert "retry 1 of 3" in caplog.text


@pytest.mark.parametrize("status", ["processing", "running", "assigned", "paused", "encoding", ""])
async def test_a_job_that_is_still_ours_is_reported(bench: Bench, status: str) -> None:
    bench.set(status=status)
    assert isinstance(await bench.delivery().attempt(), Delivered)
    assert bench.posts == 1


async def test_a_master_need_not_say_whose_the_job_is(bench: Bench) -> None:
    bench.set(node_id="")
    assert isinstance(await bench.delivery().attempt(), Delivered)


@pytest.mark.parametrize("reported", ["completed", "failed"])
@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"status": "canceled"}, "canceled"),
        ({"status": "cancelled"}, "cancelled"),
        ({"status": "completed"}, "completed"),
        ({"status": "failed"}, "failed"),
        ({"status": "timed_out"}, "timed_out"),
        ({"status": "pending", "node_id": ""}, "pending"),
        ({"status": "queued", "node_id": ""}, "queued"),
        ({"node_id": "somebody-else"}, "somebody-else"),
        ({"retry_count": 1}, "retry 1"),
    ],
)
async def test_a_job_that_is_no_longer_ours_is_left_alone(
    bench: Bench, caplog: pytest.LogCaptureFixture, reported: str, there: dict[str, Any], said: str
) -> None:
    bench.set(**there)
    waits = Waits()
    outcome = await deliver(bench.client, bench.job, bench.result(reported), sleep=waits)
    assert isinstance(outcome, Dropped)
    assert said in outcome.why
    assert "no longer ours" in caplog.text
    assert bench.posts == 0
    may_return = reported == "completed" and said in ("pending", "queued", "retry 1")
    assert len(waits.seconds) == (59 if may_return else 0)
    assert ("kept, should this node be given it again" in caplog.text) == may_return


async def test_ours_is_the_node_id_under_which_it_was_accepted(bench: Bench) -> None:
    renewed = bench.result().model_copy(update={"node_id": "a-newer-id-of-ours"})
    outcome = await Delivery(bench.client, bench.job, renewed).attempt()
    assert isinstance(outcome, Delivered)


@pytest.mark.parametrize("there", ["us", "them"])
async def test_ours_is_the_node_id_of_the_result_where_the_job_has_none(
    bench: Bench, there: str
) -> None:
    result = bench.result().model_copy(update={"node_id": "us"})
    bench.set(node_id=there)
    job = bench.job.model_copy(update={"node_id": ""})
    outcome = await Delivery(bench.client, job, result).attempt()
    assert isinstance(outcome, Delivered if there == "us" else Dropped)


async def test_a_job_the_master_does_not_know(bench: Bench) -> None:
    with bench.master.store.changed:
        bench.master.store.jobs.clear()
    waits = Waits()
    outcome = await deliver(bench.client, bench.job, bench.result(), sleep=waits)
    assert isinstance(outcome, Dropped)
    assert "does not know" in outcome.why
    assert bench.posts == 0
    assert len(waits.seconds) == 7
    assert min(waits.seconds) >= 30, "a wrong MASTER_URL costs no result at once"


async def test_a_master_that_gets_its_jobs_back_gets_the_report(bench: Bench) -> None:
    with bench.master.store.changed:
        jobs = dict(bench.master.store.jobs)
        bench.master.store.jobs.clear()
    waits = Waits(lambda: bench.master.store.jobs.update(jobs))
    outcome = await deliver(bench.client, bench.job, bench.result(), sleep=waits)
    assert isinstance(outcome, Delivered)
    assert bench.posts == 1


# A lost answer


async def test_a_completed_report_whose_answer_was_lost(bench: Bench) -> None:
    bench.master.fault("POST /results", "lose")
    waits = Waits()
    outcome = await deliver(bench.client, bench.job, bench.result(), sleep=waits)
    assert outcome == Delivered(None)
    assert len(waits.seconds) == 1
    assert bench.posts == 1


async def test_a_failed_report_whose_answer_was_lost_is_not_sent_again(bench: Bench) -> None:
    bench.master.fault("POST /results", "lose")
    outcome = await deliver(bench.client, bench.job, bench.result("failed"), sleep=Waits())
    assert outcome == Delivered(None)
    assert bench.posts == 1
    assert bench.master.job(bench.job.id)["retry_count"] == 1


async def test_a_failed_report_that_did_not_arrive_is_sent_again(bench: Bench) -> None:
    bench.master.fault("POST /results", "drop")
    bench.master.fault("POST /results", "garbage")
    outcome = await deliver(bench.client, bench.job, bench.result("failed"), sleep=Waits())
    assert isinstance(outcome, Delivered)
    assert outcome.answer is not None
    assert bench.posts == 3
    assert bench.master.job(bench.job.id)["retry_count"] == 1


async def test_half_an_answer_is_a_lost_one(bench: Bench) -> None:
    bench.master.fault("POST /results", "half")
    outcome = await deliver(bench.client, bench.job, bench.result("failed"), sleep=Waits())
    assert outcome == Delivered(None)
    assert bench.posts == 1


@pytest.mark.parametrize(
    "there",
    [
        {"retry_count": 1},
        {"status": "pending", "node_id": ""},
        {"status": "failed"},
        {"node_id": "somebody-else", "retry_count": 1},
    ],
)
async def test_how_a_failed_report_is_seen_to_have_arrived(
    bench: Bench, there: dict[str, Any]
) -> None:
    bench.set(**there)
    assert await bench.delivery("failed", maybe_landed=True).attempt() == Delivered(None)
    assert bench.posts == 0


@pytest.mark.parametrize(
    ("reported", "there"),
    [
        ("failed", {"status": "canceled"}),
        ("failed", {"status": "completed"}),
        ("completed", {"status": "pending"}),
        ("completed", {"status": "failed"}),
        ("completed", {"node_id": "somebody-else"}),
    ],
)
async def test_what_a_report_does_not_explain(
    bench: Bench, reported: str, there: dict[str, Any]
) -> None:
    bench.set(**there)
    outcome = await deliver(
        bench.client, bench.job, bench.result(reported), maybe_landed=True, sleep=Waits()
    )
    assert isinstance(outcome, Dropped)
    assert bench.posts == 0


async def test_a_job_that_waited_there_and_is_given_to_another_node_is_let_go(
    bench: Bench,
) -> None:
    bench.set(status="pending", node_id="", retry_count=1)
    waits = Waits(lambda: bench.set(status="processing", node_id="somebody-else"))
    outcome = await deliver(bench.client, bench.job, bench.result("completed"), sleep=waits)
    assert isinstance(outcome, Dropped)
    assert "somebody-else" in outcome.why
    assert bench.posts == 0


async def test_an_attempt_cut_short_may_have_landed(bench: Bench) -> None:
    bench.master.fault("POST /results", "hang")
    delivery = bench.delivery("failed")
    assert not delivery.maybe_landed
    attempt = asyncio.create_task(delivery.attempt())
    await asyncio.to_thread(bench.master.wait_for_request, "POST /results")
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt
    assert delivery.maybe_landed


# A master that fails


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 404, 418])
async def test_errors_that_pass_are_waited_out(bench: Bench, status: int) -> None:
    bench.master.fault(
        "POST /results", "status", status=status, count=2, headers={"Retry-After": "40"}
    )
    waits = Waits()
    backoff = Backoff(1.0, 60.0, uniform=steady)
    outcome = await deliver(
        bench.client, bench.job, bench.result(), sleep=waits, backoff=backoff
    )  # fmt: skip
    assert isinstance(outcome, Delivered)
    assert waits.seconds == [41.0, 42.0]
    assert len(bench.master.seen("GET /jobs/1")) == 3


async def test_an_error_after_the_change_was_made(bench: Bench) -> None:
    """A proxy answers 504 though the master behind it has done its work."""
    bench.master.fault("POST /results", "status", status=504)
    waits = Waits(lambda: bench.master.store.result({"job_id": bench.job.id, "status": "failed"}))
    outcome = await deliver(bench.client, bench.job, bench.result("failed"), sleep=waits)
    assert outcome == Delivered(None)
    assert bench.master.job(bench.job.id)["retry_count"] == 1


async def test_a_job_that_vanishes_between_look_and_post(bench: Bench) -> None:
    bench.master.fault("POST /results", "status", body="Failed to update job status")
    waits = Waits(bench.master.store.jobs.clear)
    outcome = await deliver(bench.client, bench.job, bench.result(), sleep=waits)
    assert isinstance(outcome, Dropped)
    assert "does not know" in outcome.why


@pytest.mark.parametrize("status", [400, 422])
async def test_a_report_that_is_not_understood_is_not_repeated(
    bench: Bench, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    bench.master.fault("POST /results", "status", status=status, body="Invalid request body")
    outcome = await deliver(bench.client, bench.job, bench.result(), sleep=Waits())
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
    outcome = await deliver(bench.client, bench.job, bench.result(), sleep=waits, slow=slow)
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

    client = MasterClient(base_url="http://box", transport=httpx.MockTransport(handler))
    job = Job(id="j", node_id="n")
    result = JobResult(job_id="j", node_id="n", status="failed")
    outcome = await deliver(client, job, result, sleep=sleep, clock=lambda: now)
    assert isinstance(outcome, Delivered)
    assert len(waits) == failures
    assert [r.levelname for r in caplog.records].count("WARNING") == 2


# A master that cannot be asked


def blind(*answers: Any) -> tuple[MasterClient, list[str]]:
    """A master whose only route is POST /results."""
    posts: list[str] = []
    left = list(answers)

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/results":
            return httpx.Response(404, text="404 page not found\n")
        posts.append(request.content.decode())
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, httpx.Response)
        return answer

    transport = httpx.MockTransport(handler)
    return MasterClient(base_url="http://box", transport=transport), posts


SUCCESS = httpx.Response(200, json={"status": "success"})


async def test_without_a_look_up_it_is_posted_all_the_same() -> None:
    client, posts = blind(SUCCESS)
    job = Job(id="j", node_id="n", sequence_number=1)
    result = JobResult(job_id="j", node_id="n", status="failed")
    assert isinstance(await deliver(client, job, result, sleep=Waits()), Delivered)
    assert len(posts) == 1


async def test_without_a_look_up_completed_may_be_repeated() -> None:
    client, posts = blind(httpx.ReadError("lost"), SUCCESS)
    result = JobResult(job_id="j", node_id="n", status="completed")
    assert isinstance(await deliver(client, Job(id="j"), result, sleep=Waits()), Delivered)
    assert len(posts) == 2


async def test_without_a_look_up_failed_is_never_repeated_blindly() -> None:
    client, posts = blind(httpx.ReadError("lost"), SUCCESS)
    result = JobResult(job_id="j", node_id="n", status="failed")
    outcome = await deliver(client, Job(id="j"), result, sleep=Waits())
    assert isinstance(outcome, Dropped)
    assert len(posts) == 1


async def test_what_never_left_may_be_repeated() -> None:
    client, posts = blind(httpx.ConnectError("refused"), SUCCESS)
    result = JobResult(job_id="j", node_id="n", status="failed")
    assert isinstance(await deliver(client, Job(id="j"), result, sleep=Waits()), Delivered)
    assert len(posts) == 2


# Nodes with more than one id, and look-ups that do not work


async def test_a_job_that_moved_to_our_new_id_is_still_ours(bench: Bench) -> None:
    bench.set(node_id="our-new-id")
    outcome = await bench.delivery("failed", node_ids={"our-new-id"}).attempt()
    assert isinstance(outcome, Delivered)
    assert bench.posts == 1


@pytest.mark.parametrize("kind", ["status", "garbage"])
async def test_a_look_up_that_never_works_does_not_keep_a_report_for_ever(
    bench: Bench, kind: Any
) -> None:
    bench.master.fault("GET /jobs/1", kind, count=100)
    waits = Waits()
    outcome = await deliver(bench.client, bench.job, bench.result("failed"), sleep=waits)
    assert isinstance(outcome, Delivered)
    assert len(waits.seconds) == 5
    assert bench.posts == 1


async def test_a_busy_master_is_waited_for_however_often_it_says_so(bench: Bench) -> None:
    bench.master.fault("GET /jobs/1", "status", status=503, count=20)
    waits = Waits()
    outcome = await deliver(bench.client, bench.job, bench.result("failed"), sleep=waits)
    assert isinstance(outcome, Delivered)
    assert len(waits.seconds) == 20


async def test_a_failed_report_that_may_have_landed_is_not_repeated_without_a_look(
    bench: Bench,
) -> None:
    bench.master.fault("GET /jobs/1", "status", count=100)
    outcome = await deliver(
        bench.client, bench.job, bench.result("failed"), maybe_landed=True, sleep=Waits()
    )
    assert isinstance(outcome, Dropped)
    assert bench.posts == 0


# Reports that are days old


async def test_another_job_that_has_the_id_now_is_left_alone(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.set(created_at="2031-01-01T00:00:00Z")
    for maybe_landed in (False, True):
        outcome = await bench.delivery("failed", maybe_landed=maybe_landed).attempt()
        assert isinstance(outcome, Dropped)
        assert "another job, made at 2031-01-01" in outcome.why
    assert "another job" in caplog.text
    assert bench.posts == 0


@pytest.mark.parametrize("reported", ["completed", "failed"])
@pytest.mark.parametrize("maybe_landed", [False, True])
@pytest.mark.parametrize("retry", [1, 2])
async def test_a_master_restored_from_a_backup_that_waits_for_us(
    bench: Bench, reported: str, maybe_landed: bool, retry: int
) -> None:
    """It has the job with us, in this retry or an earlier one: the result ends it."""
    bench.job = bench.job.model_copy(update={"retry_count": 2})
    bench.set(retry_count=retry)
    outcome = await bench.delivery(reported, maybe_landed=maybe_landed).attempt()
    assert isinstance(outcome, Delivered)
    assert outcome.answer is not None
    assert bench.posts == 1


@pytest.mark.parametrize("reported", ["completed", "failed"])
@pytest.mark.parametrize("maybe_landed", [False, True])
async def test_a_master_restored_from_a_backup_older_than_our_turn(
    bench: Bench, reported: str, maybe_landed: bool
) -> None:
    """The job waits there, and runs again: its old result must not come in between."""
    bench.job = bench.job.model_copy(update={"retry_count": 2})
    bench.set(status="pending", node_id="", retry_count=1)
    outcome = await deliver(
        bench.client, bench.job, bench.result(reported), maybe_landed=maybe_landed, sleep=Waits()
    )
    assert isinstance(outcome, Dropped)
    assert bench.posts == 0


async def test_a_failed_report_that_arrived_days_ago_is_not_sent_again(bench: Bench) -> None:
    """It was queued again, and we were given it again."""
    bench.set(retry_count=1)
    assert await bench.delivery("failed", maybe_landed=True).attempt() == Delivered(None)
    assert bench.posts == 0
