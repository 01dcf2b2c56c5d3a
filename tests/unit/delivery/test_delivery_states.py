"""Reports go to jobs that are still ours: every state a job can be found in."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.unit.delivery.bench import Bench, Waits
from worker.master.delivery import Delivered, Delivery, Dropped


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
    outcome = await bench.deliver(reported, sleep=waits)
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


async def test_a_job_that_moved_to_our_new_id_is_still_ours(bench: Bench) -> None:
    bench.set(node_id="our-new-id")
    outcome = await bench.delivery("failed", node_ids={"our-new-id"}).attempt()
    assert isinstance(outcome, Delivered)
    assert bench.posts == 1


async def test_a_job_the_master_does_not_know(bench: Bench) -> None:
    with bench.master.store.changed:
        bench.master.store.jobs.clear()
    waits = Waits()
    outcome = await bench.deliver(sleep=waits)
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
    outcome = await bench.deliver(sleep=waits)
    assert isinstance(outcome, Delivered)
    assert bench.posts == 1


async def test_a_job_that_waited_there_and_is_given_to_another_node_is_let_go(
    bench: Bench,
) -> None:
    bench.set(status="pending", node_id="", retry_count=1)
    waits = Waits(lambda: bench.set(status="processing", node_id="somebody-else"))
    outcome = await bench.deliver("completed", sleep=waits)
    assert isinstance(outcome, Dropped)
    assert "somebody-else" in outcome.why
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
    outcome = await bench.deliver(reported, maybe_landed=maybe_landed)
    assert isinstance(outcome, Dropped)
    assert bench.posts == 0
