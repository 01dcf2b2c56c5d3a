"""Slots: when jobs are asked for, how many run, and what a defect costs."""

from __future__ import annotations

import pytest

from tests.unit.dispatch.bench import Benches, a_while, job
from worker.acceptance import Acceptance
from worker.errors import MasterRefused, MasterUnreachable
from worker.execution import Execution
from worker.ledger import Entry
from worker.master.wire import Job, JobResult


async def test_free_slots_fill_in_one_burst(benches: Benches) -> None:
    bench = benches(job("a"), job("b"), job("c"))
    await bench.settled(lambda: len(bench.dispatcher.running) == 2)
    assert bench.source.asked == 2, "no question while no slot is free"


async def test_a_slot_that_frees_polls_at_once(benches: Benches) -> None:
    bench = benches(job("a"), job("b"), job("c"))
    await bench.settled(lambda: len(bench.executions) == 2)
    bench.executions["a"].ended.set()
    await bench.begun("c")
    assert set(bench.dispatcher.running) == {"b", "c"}


async def test_a_slot_that_frees_ends_the_wait_after_an_empty_answer(benches: Benches) -> None:
    bench = benches(job("a"))
    await bench.source.asked_times(2)  # the second answer was empty: now it waits for an hour
    bench.source.answers.append(job("b"))
    bench.executions["a"].ended.set()
    await bench.begun("b")


async def test_an_empty_answer_waits_for_the_poll_interval(benches: Benches) -> None:
    bench = benches(poll_interval=0.01)
    await bench.source.asked_times(3)


@pytest.mark.parametrize(
    "error", [MasterUnreachable("down"), MasterRefused("odd", 500), MasterRefused("no", 401)]
)
async def test_an_error_waits_and_does_not_end_the_loop(benches: Benches, error: Exception) -> None:
    bench = benches(error)
    await bench.source.asked_times(1)
    await a_while()
    assert bench.source.asked == 1


async def test_what_blocks_is_not_asked_around(benches: Benches) -> None:
    bench = benches(job("a"), poll_interval=0.01)
    bench.reason = "the disk is full"
    await a_while()
    assert bench.source.asked == 0
    bench.reason = ""
    await bench.begun("a")


async def test_a_master_that_repeats_itself_is_not_hammered(benches: Benches) -> None:
    bench = benches(*[job("a")] * 50, slots=2)
    await bench.source.asked_times(2)
    await a_while(100)
    assert bench.source.asked == 2


async def test_a_live_job_that_may_go_stale_is_the_last_one_taken(benches: Benches) -> None:
    long = {"timeout_sec": 3600}
    bench = benches(job("a", queue="live", resource_limits=long), job("b"), slots=4)
    await bench.begun("a")
    await a_while()
    assert bench.source.asked == 1
    bench.executions["a"].ended.set()
    await bench.begun("b")


async def test_a_short_live_job_keeps_nothing_waiting(benches: Benches) -> None:
    bench = benches(job("a", queue="live"), job("b"), slots=4)
    await bench.begun("b")


async def test_a_node_that_cannot_report_takes_no_more_jobs(
    benches: Benches, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker.reports.MOST_UNDELIVERED", 1)
    bench = benches(job("a"), poll_interval=0.01)
    bench.delivering.clear()
    (await bench.begun("a")).ended.set()
    await bench.settled(lambda: "taking no jobs: 1 results are not delivered" in caplog.text)
    asked = bench.source.asked
    await a_while()
    assert bench.source.asked == asked
    bench.source.answers.append(job("b"))
    bench.delivering.set()
    await bench.begun("b")


async def test_a_defect_in_taking_a_job_costs_that_job_only(
    benches: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: Job) -> Entry:
        raise RecursionError("no")

    bench = benches()
    with monkeypatch.context() as patch:
        patch.setattr(bench.ledger, "accept", broken)
        bench.source.answers.append(job("bad"))
        bench.dispatcher.nudge()
        await bench.settled(lambda: bench.reported)
    assert bench.reported[0][1].error == "platform_error: internal error: RecursionError"
    await bench.settled(lambda: not bench.dispatcher.held)
    bench.source.answers.append(job("good"))
    bench.dispatcher.nudge()
    await bench.begun("good")


@pytest.mark.parametrize("where", ["making", "running"])
async def test_a_defect_costs_one_job_and_not_the_node(
    benches: Benches, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = benches(slots=2)
    await bench.source.asked_times(1)
    plain = bench.execute

    def execute(acceptance: Acceptance) -> Execution:
        job = acceptance.job
        if job.id == "bad" and where == "making":
            raise RecursionError("too deep")
        execution = plain(acceptance)
        if job.id == "bad":
            execution.run = broken  # type: ignore[method-assign]
        return execution

    async def broken() -> JobResult:
        raise OSError("no space")

    bench.dispatcher._execute = execute
    bench.source.answers += [job("bad", node_id="n"), job("good")]
    bench.dispatcher._slot_freed.set()
    await bench.settled(lambda: "good" in bench.executions and bench.reported)
    [(_, result)] = bench.reported
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.startswith("platform_error: internal error")
    assert bench.metrics._active == 1
    assert bench.metrics._failed["platform_error"] == 1
    assert "internal error" in caplog.text
