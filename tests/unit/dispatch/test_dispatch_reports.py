"""What is held and put on record until a report is off."""

from __future__ import annotations

import pytest

from tests.unit.dispatch.bench import Benches, job
from worker.errors import LedgerError
from worker.jobs.outcome import Intent
from worker.ledger import Entry
from worker.master.delivery import Delivered, Dropped
from worker.master.wire import Job


async def test_a_job_is_held_until_its_report_is_off(benches: Benches) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    execution = await bench.begun("a")
    execution.ended.set()
    await bench.settled(lambda: not bench.dispatcher.running)
    assert bench.dispatcher.held == {"a"}
    assert execution.closed == 0

    bench.delivering.set()

    await bench.settled(lambda: not bench.dispatcher.held)
    assert execution.done == ["released", "released", "closed"]
    assert [result.status for _, result in bench.reported] == ["completed"]


async def test_each_step_is_on_record(benches: Benches) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    await bench.begun("a")
    assert bench.states() == ["accepted"]
    bench.executions["a"].ended.set()
    await bench.settled(lambda: bench.states() == ["finished"])
    bench.delivering.set()
    await bench.settled(lambda: bench.states() == ["reaped"])
    [entry] = bench.entries()
    assert (entry.settled, entry.evidence["unit"]) == ("delivered", "ffmpeg-job-a.service")


async def test_a_report_that_is_not_wanted_is_off_the_record_with_the_reason(
    benches: Benches,
) -> None:
    bench = benches(job("a"))
    bench.answer = Dropped("it is with node b")
    (await bench.begun("a")).ended.set()
    await bench.settled(lambda: bench.states() == ["reaped"])
    assert [(e.settled, e.why) for e in bench.entries()] == [("dropped", "it is with node b")]


async def test_a_job_that_cannot_be_put_on_record_is_handed_back(
    benches: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(job: Job) -> Entry:
        raise LedgerError("disk full")

    bench = benches()
    monkeypatch.setattr(bench.ledger, "accept", full)
    bench.source.answers.append(job("a", node_id="n"))
    bench.dispatcher._slot_freed.set()
    await bench.settled(lambda: bench.reported)
    assert bench.executions == {}
    assert bench.reported[0][1].error == "platform_error: the worker cannot take jobs: disk full"
    await bench.settled(lambda: not bench.dispatcher.held)


async def test_a_result_that_cannot_be_put_on_record_keeps_its_unit_until_it_is_delivered(
    benches: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise LedgerError("disk full")

    bench = benches(job("a"))
    bench.delivering.clear()
    await bench.begun("a")
    monkeypatch.setattr(bench.ledger, "finish", full)
    bench.executions["a"].ended.set()
    await bench.settled(lambda: not bench.dispatcher.running)
    assert bench.executions["a"].done == []
    bench.delivering.set()
    await bench.settled(lambda: not bench.dispatcher.held)
    assert bench.executions["a"].done == ["released", "closed"]


@pytest.mark.parametrize("intent", [Intent.CANCELLED, Intent.GONE])
async def test_nothing_is_reported_of_a_job_that_is_not_wanted_any_more(
    benches: Benches, intent: Intent
) -> None:
    bench = benches(job("a"))
    await bench.begun("a")
    bench.executions["a"].stop(intent)
    await bench.settled(lambda: not bench.dispatcher.held)
    assert bench.states() == ["reaped"]
    assert bench.reported == []
    assert bench.entries()[0].settled == "dropped"
    assert bench.executions["a"].closed == 1
    assert (bench.metrics._active, bench.metrics._cancelled_graceful) == (0, 1)


async def test_a_defect_in_reporting_keeps_the_job_ours(
    benches: Benches, caplog: pytest.LogCaptureFixture
) -> None:
    bench = benches(job("a"))

    async def broken(*_args: object, **_options: object) -> Delivered | Dropped:
        raise RuntimeError("no")

    bench.dispatcher.reports._deliver = broken
    (await bench.begun("a")).ended.set()
    await bench.settled(lambda: "reporting it failed" in caplog.text)
    assert bench.dispatcher.held == {"a"}
    assert bench.states() == ["finished"]
