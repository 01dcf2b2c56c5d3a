"""Reports that must arrive once, where the answer to one was lost."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.fakes.transport import client_of, result
from tests.unit.delivery.bench import Bench, Waits
from worker.master.delivery import Delivered, Dropped, deliver
from worker.master.wire import Job


async def test_a_completed_report_whose_answer_was_lost(bench: Bench) -> None:
    bench.master.fault("POST /results", "lose")
    waits = Waits()
    outcome = await bench.deliver(sleep=waits)
    assert outcome == Delivered(None)
    assert len(waits.seconds) == 1
    assert bench.posts == 1


async def test_a_failed_report_whose_answer_was_lost_is_not_sent_again(bench: Bench) -> None:
    bench.master.fault("POST /results", "lose")
    outcome = await bench.deliver("failed")
    assert outcome == Delivered(None)
    assert bench.posts == 1
    assert bench.master.job(bench.job.id)["retry_count"] == 1


async def test_a_failed_report_that_did_not_arrive_is_sent_again(bench: Bench) -> None:
    bench.master.fault("POST /results", "drop")
    bench.master.fault("POST /results", "garbage")
    outcome = await bench.deliver("failed")
    assert isinstance(outcome, Delivered)
    assert outcome.answer is not None
    assert bench.posts == 3
    assert bench.master.job(bench.job.id)["retry_count"] == 1


async def test_half_an_answer_is_a_lost_one(bench: Bench) -> None:
    bench.master.fault("POST /results", "half")
    outcome = await bench.deliver("failed")
    assert outcome == Delivered(None)
    assert bench.posts == 1


@pytest.mark.parametrize(
    "there",
    [
        {"retry_count": 1},  # days ago, perhaps: it was queued again, and we were given it again
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
    outcome = await bench.deliver(reported, maybe_landed=True)
    assert isinstance(outcome, Dropped)
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


# A master that cannot be asked

SUCCESS = httpx.Response(200, json={"status": "success"})
JOB = Job(id="j")


async def deliver_blindly(
    status: str, *answers: httpx.Response | Exception, job: Job = JOB
) -> tuple[Delivered | Dropped, int]:
    """The outcome, and how many posts it took, at a master whose only route is POST /results."""
    posts: list[httpx.Request] = []
    left = list(answers)

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/results":
            return httpx.Response(404, text="404 page not found\n")
        posts.append(request)
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    outcome = await deliver(client_of(handler), job, result(status=status), sleep=Waits())
    return outcome, len(posts)


async def test_without_a_look_up_it_is_posted_all_the_same() -> None:
    job = Job(id="j", node_id="n", sequence_number=1)
    outcome, posts = await deliver_blindly("failed", SUCCESS, job=job)
    assert isinstance(outcome, Delivered)
    assert posts == 1


async def test_without_a_look_up_completed_may_be_repeated() -> None:
    outcome, posts = await deliver_blindly("completed", httpx.ReadError("lost"), SUCCESS)
    assert isinstance(outcome, Delivered)
    assert posts == 2


async def test_without_a_look_up_failed_is_never_repeated_blindly() -> None:
    outcome, posts = await deliver_blindly("failed", httpx.ReadError("lost"), SUCCESS)
    assert isinstance(outcome, Dropped)
    assert posts == 1


async def test_what_never_left_may_be_repeated() -> None:
    outcome, posts = await deliver_blindly("failed", httpx.ConnectError("refused"), SUCCESS)
    assert isinstance(outcome, Delivered)
    assert posts == 2


async def test_a_failed_report_that_may_have_landed_is_not_repeated_without_a_look(
    bench: Bench,
) -> None:
    bench.master.fault("GET /jobs/1", "status", count=100)
    outcome = await bench.deliver("failed", maybe_landed=True)
    assert isinstance(outcome, Dropped)
    assert bench.posts == 0
