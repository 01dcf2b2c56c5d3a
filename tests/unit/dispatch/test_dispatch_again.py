"""A job that is handed out again: while it runs, while its report is on its way, and later."""

from __future__ import annotations

import pytest

from tests.unit.dispatch.bench import Benches, job
from worker.jobs.outcome import Intent
from worker.master.wire import Job


async def test_a_job_handed_out_again_while_it_runs_is_not_started_twice(benches: Benches) -> None:
    bench = benches(job("a"), job("a", retry_count=1), slots=2)
    await bench.source.asked_times(2)
    await bench.settled(lambda: bench.executions["a"].job.retry_count == 1)
    first = bench.executions["a"]
    assert len(bench.dispatcher.running) == 1
    first.ended.set()
    await bench.settled(lambda: bench.reported)
    assert bench.reported[0][0].retry_count == 1, "the report answers for the new acceptance"


async def test_a_repeated_hand_out_is_said_once_a_retry(
    benches: Benches, caplog: pytest.LogCaptureFixture
) -> None:
    again = [job("a"), job("a"), job("a", retry_count=1), job("a", retry_count=1)]
    bench = benches(job("a"), *again, poll_interval=0.001)
    await bench.source.asked_times(6)
    assert [r.levelname for r in caplog.records].count("WARNING") == 2


async def test_a_failed_report_on_the_way_is_dropped_for_a_new_acceptance(benches: Benches) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    first = await bench.begun("a")
    bench.source.answers.append(job("a", retry_count=1))
    first.status = "failed"
    first.ended.set()
    await bench.settled(lambda: bench.executions["a"] is not first)
    assert first.closed == 1, "the folder must be free for the new run"
    bench.delivering.set()
    await bench.settled(lambda: bench.states() == ["reaped", "accepted"])
    assert bench.reported == []
    assert bench.entries()[0].why == "the job was handed out anew"


@pytest.mark.parametrize("status", ["completed", "failed"])
async def test_a_report_on_the_way_is_left_alone_by_its_own_acceptance(
    benches: Benches, status: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a master that keeps handing out the job never gets it; nor is it asked without pause."""
    bench = benches(job("a", retry_count=0), poll_interval=0.01)
    bench.delivering.clear()
    first = await bench.begun("a")
    first.status = status
    first.ended.set()
    await bench.settled(lambda: bench.deliveries)
    asked = bench.source.asked
    bench.source.answers += [job("a", retry_count=0)] * 5
    await bench.source.asked_times(asked + 6)
    assert bench.deliveries == 1
    bench.delivering.set()
    await bench.settled(lambda: bench.reported)
    assert [result.status for _, result in bench.reported] == [status]
    assert bench.executions["a"] is first
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


async def test_a_completed_report_on_the_way_answers_for_a_new_acceptance(benches: Benches) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    first = await bench.begun("a")
    bench.source.answers.append(job("a", retry_count=1))
    first.ended.set()
    await bench.settled(lambda: [e.job.retry_count for e in bench.entries()] == [1])
    bench.delivering.set()
    await bench.settled(lambda: bench.states() == ["reaped"])
    assert bench.executions["a"] is first, "it was not run again"
    assert [(job.retry_count, result.status) for job, result in bench.reported] == [
        (1, "completed")
    ]


async def test_a_master_that_was_set_back_gets_the_same_result_again(benches: Benches) -> None:
    bench = benches(job("a", retry_count=0), poll_interval=0.01)
    first = await bench.begun("a")
    first.ended.set()
    await bench.settled(lambda: bench.states() == ["reaped"])
    bench.source.answers.append(job("a", retry_count=0, node_id="new"))
    await bench.settled(lambda: len(bench.reported) == 2)
    assert bench.executions["a"] is first, "it was not run again"
    assert bench.reported[1][1].node_id == "new"
    assert bench.states() == ["reaped"]
    await bench.settled(lambda: not bench.dispatcher.held)


@pytest.mark.parametrize(
    "again",
    [job("a", retry_count=1), job("a", retry_count=0, created_at="2026-01-01T00:00:00Z"), job("a")],
    ids=["retry", "reused id", "no count of retries"],
)
async def test_another_acceptance_of_the_same_id_is_run(benches: Benches, again: Job) -> None:
    bench = benches(job("a", retry_count=0), poll_interval=0.01)
    first = await bench.begun("a")
    first.ended.set()
    await bench.settled(lambda: bench.states() == ["reaped"])
    bench.source.answers.append(again)
    await bench.settled(lambda: bench.executions["a"] is not first)
    assert bench.states() == ["reaped", "accepted"]


async def test_a_job_handed_out_anew_while_it_is_being_stopped_is_run_again(
    benches: Benches,
) -> None:
    bench = benches(job("a"))
    first = await bench.begun("a")
    first.steps.intent = Intent.CANCELLED  # told to stop, and not ended yet
    bench.source.answers.append(job("a", retry_count=1))
    bench.dispatcher.nudge()
    await bench.source.asked_times(3)
    assert bench.executions["a"] is first
    first.ended.set()
    await bench.settled(lambda: bench.executions["a"] is not first)
    assert bench.states() == ["reaped", "accepted"]
    assert bench.reported == []


async def test_what_is_left_open_of_an_older_acceptance_is_dropped(benches: Benches) -> None:
    bench = benches()
    bench.ledger.accept(job("a", retry_count=0))
    bench.source.answers.append(job("a", retry_count=1))
    bench.dispatcher.nudge()
    await bench.begun("a")
    assert bench.states() == ["reaped", "accepted"]
