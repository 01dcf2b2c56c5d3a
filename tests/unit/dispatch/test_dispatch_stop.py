"""How it all ends: jobs are stopped or left, and their reports go off or stay on record."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.dispatch.bench import Benches, job
from worker.dispatch import LEFT_TO_THE_MASTER
from worker.jobs.outcome import Intent


async def test_stopping_ends_the_jobs_and_sees_the_reports_off(benches: Benches) -> None:
    bench = benches(job("a"), job("b"))
    await bench.settled(lambda: len(bench.executions) == 2)
    await bench.stop()
    assert {e.steps.intent for e in bench.executions.values()} == {Intent.SHUTDOWN}
    assert len(bench.reported) == 2
    assert bench.dispatcher.held == set()


async def test_a_hurried_stop_waits_for_no_report(
    benches: Benches, caplog: pytest.LogCaptureFixture
) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    await bench.begun("a")
    await bench.stop(hurried=True)
    assert bench.reported == []
    assert bench.executions["a"].closed == 0, "the next run must find that it was not reported"
    assert "job a: the master did not take its result in time" in caplog.text


async def test_a_report_that_is_cut_short_stays_on_record(benches: Benches) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    await bench.begun("a")
    await bench.stop(hurried=True)
    assert bench.states() == ["finished"]


@pytest.mark.parametrize(
    ("fields", "reported"),
    [({"retry_count": 2}, 1), ({"retry_count": 3}, 0), ({"retry_count": 2, "max_retries": 2}, 0)],
)
async def test_the_last_retry_is_not_handed_back_as_a_failure(
    benches: Benches, fields: dict[str, int], reported: int
) -> None:
    bench = benches(job("a", **fields))
    await bench.begun("a")
    await bench.dispatcher.stop(Intent.SHUTDOWN, asyncio.Event())
    assert len(bench.reported) == reported
    assert bench.dispatcher.left_to_the_master == (reported == 0)
    assert bench.entries()[0].why == ("" if reported else LEFT_TO_THE_MASTER)


async def test_a_job_that_does_not_end_does_not_hold_up_the_stop(
    benches: Benches, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.dispatch.LAST_JOBS_SEC", 0.01)
    bench = benches(job("a"))
    await bench.begun("a")
    bench.executions["a"].stop = lambda intent: None  # type: ignore[method-assign]
    async with asyncio.timeout(5):
        await bench.dispatcher.stop(Intent.SHUTDOWN, asyncio.Event())
    assert "could not be ended in time: a" in caplog.text
    assert bench.states() == ["accepted"], "the next run takes it up"
    assert bench.reported == []


async def test_leaving_changes_nothing(benches: Benches) -> None:
    bench = benches(job("a"), job("b"))
    bench.delivering.clear()
    await bench.settled(lambda: len(bench.executions) == 2)
    bench.executions["b"].ended.set()
    await bench.settled(lambda: bench.states() == ["accepted", "finished"])
    await bench.dispatcher.leave()
    assert bench.executions["a"].left
    assert bench.executions["a"].done == []
    assert bench.executions["b"].closed == 0
    assert bench.states() == ["accepted", "finished"]
    assert bench.reported == []
