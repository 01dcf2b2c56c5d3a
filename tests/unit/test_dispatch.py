"""Slots: when jobs are asked for, how many run, what is held, and how it all ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Any, cast

import pytest

from worker.acceptance import Acceptance
from worker.dispatch import LEFT_TO_THE_MASTER, Dispatcher
from worker.errors import LedgerError, MasterRefused, MasterUnreachable
from worker.execution import Execution
from worker.jobs.outcome import Intent
from worker.jobs.spec import Limits, Queue
from worker.ledger import Entry, Ledger
from worker.master.delivery import Delivered, Dropped
from worker.master.wire import Job, JobResult
from worker.telemetry.metrics import Metrics


class Spec:
    def __init__(self, queue: str, timeout_sec: int) -> None:
        self.queue = Queue(queue)
        self.limits = Limits(100, 100, 100, timeout_sec)


class FakeExecution:
    """A job that ends when it is told to."""

    def __init__(self, job: Job) -> None:
        self.job = job
        limits = job.resource_limits or {}
        self.spec = Spec(job.queue or "default", limits.get("timeout_sec", 60))
        self.ended = asyncio.Event()
        self.status = "completed"
        self.left = False
        self.done: list[str] = []
        self.outcome = self.facts = None
        self.killed = False
        self.steps = type("Steps", (), {"start_seconds": [], "intent": Intent.NONE})()

    async def run(self) -> JobResult | None:
        await self.ended.wait()
        if self.left:
            return None
        return JobResult(job_id=self.job.id, node_id="n", status=self.status)

    def stop(self, intent: Intent) -> None:
        self.steps.intent = intent
        self.status = "failed"
        self.ended.set()

    def leave(self) -> None:
        self.left = True
        self.ended.set()

    def evidence(self) -> dict[str, Any]:
        return {"unit": f"ffmpeg-job-{self.job.id}.service"}

    async def release(self) -> None:
        self.done.append("released")

    @property
    def closed(self) -> int:
        return self.done.count("closed")

    def close(self) -> None:
        self.done.append("closed")


class FakeSource:
    """A master whose answers are put in by the test; it notes each question."""

    registered = True

    def __init__(self) -> None:
        self.answers: list[Job | Exception] = []
        self.asked = 0
        self.changed = asyncio.Condition()

    async def next_job(self, held: Collection[str] | None = None) -> Job | None:
        async with self.changed:
            self.asked += 1
            self.changed.notify_all()
            answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def asked_times(self, count: int) -> None:
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(lambda: self.asked >= count)


class Bench:
    def __init__(self, ledger: Ledger, slots: int, poll_interval: float) -> None:
        self.source = FakeSource()
        self.ledger = ledger
        self.answer: Delivered | Dropped = Delivered(None)
        self.executions: dict[str, FakeExecution] = {}
        self.reported: list[tuple[Job, JobResult]] = []
        self.delivering = asyncio.Event()
        self.delivering.set()
        self.reason = ""
        self.metrics = Metrics("node", 1)
        self.dispatcher = Dispatcher(
            slots=slots,
            poll_interval=poll_interval,
            execute=self.execute,
            deliver=self.deliver,
            ledger=ledger,
            blocked=lambda: self.reason,
            metrics=self.metrics,
        )

    def execute(self, acceptance: Acceptance) -> Execution:
        job = acceptance.job
        execution = self.executions[job.id] = FakeExecution(job)
        return cast("Execution", execution)

    async def deliver(
        self, job: Job, result: JobResult, *, maybe_landed: bool = False
    ) -> Delivered | Dropped:
        await self.delivering.wait()
        self.reported.append((job, result))
        return self.answer

    def entries(self) -> list[Entry]:
        """All that is on record, oldest first."""
        return self.ledger.recent(100)[::-1]

    def states(self) -> list[str]:
        return [entry.state.value for entry in self.entries()]

    async def settled(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0)


@pytest.fixture
async def benches(tmp_path: Path) -> AsyncIterator[Callable[..., Bench]]:
    ledger = Ledger.open(tmp_path / "work/ledger.db")
    tasks: list[tuple[Bench, asyncio.Task[None]]] = []

    def make(*answers: Job | Exception, slots: int = 2, poll_interval: float = 3600.0) -> Bench:
        bench = Bench(ledger, slots, poll_interval)
        bench.source.answers += answers
        tasks.append((bench, asyncio.create_task(bench.dispatcher.run(bench.source))))
        return bench

    yield make
    for bench, task in tasks:
        bench.delivering.set()
        bench.dispatcher.stop_polling()
        await task
        await bench.dispatcher.stop(Intent.SHUTDOWN, asyncio.Event())
    ledger.close()


def job(job_id: str, **fields: Any) -> Job:
    return Job(id=job_id, **fields)


async def test_free_slots_fill_in_one_burst(benches: Callable[..., Bench]) -> None:
    bench = benches(job("a"), job("b"), job("c"))
    await bench.settled(lambda: len(bench.dispatcher.running) == 2)
    assert bench.source.asked == 2, "no question while no slot is free"


async def test_a_slot_that_frees_polls_at_once(benches: Callable[..., Bench]) -> None:
    bench = benches(job("a"), job("b"), job("c"))
    await bench.settled(lambda: len(bench.executions) == 2)
    bench.executions["a"].ended.set()
    await bench.settled(lambda: "c" in bench.executions)
    assert set(bench.dispatcher.running) == {"b", "c"}


async def test_a_slot_that_frees_ends_the_wait_after_an_empty_answer(
    benches: Callable[..., Bench],
) -> None:
    bench = benches(job("a"))
    await bench.source.asked_times(2)  # the second answer was empty: now it waits for an hour
    bench.source.answers.append(job("b"))
    bench.executions["a"].ended.set()
    await bench.settled(lambda: "b" in bench.executions)


async def test_an_empty_answer_waits_for_the_poll_interval(benches: Callable[..., Bench]) -> None:
    bench = benches(poll_interval=0.01)
    await bench.source.asked_times(3)


@pytest.mark.parametrize(
    "error", [MasterUnreachable("down"), MasterRefused("odd", 500), MasterRefused("no", 401)]
)
async def test_an_error_waits_and_does_not_end_the_loop(
    benches: Callable[..., Bench], error: Exception
) -> None:
    bench = benches(error)
    await bench.source.asked_times(1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert bench.source.asked == 1


async def test_what_blocks_is_not_asked_around(benches: Callable[..., Bench]) -> None:
    bench = benches(job("a"), poll_interval=0.01)
    bench.reason = "the disk is full"
    for _ in range(20):
        await asyncio.sleep(0)
    assert bench.source.asked == 0
    bench.reason = ""
    await bench.settled(lambda: "a" in bench.executions)


async def test_a_job_is_held_until_its_report_is_off(benches: Callable[..., Bench]) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    await bench.settled(lambda: "a" in bench.executions)
    execution = bench.executions["a"]
    execution.ended.set()
    await bench.settled(lambda: not bench.dispatcher.running)
    assert bench.dispatcher.held == {"a"}
    assert execution.closed == 0

    bench.delivering.set()

    await bench.settled(lambda: not bench.dispatcher.held)
    assert execution.done == ["released", "released", "closed"]
    assert [result.status for _, result in bench.reported] == ["completed"]


async def test_a_job_handed_out_again_while_it_runs_is_not_started_twice(
    benches: Callable[..., Bench],
) -> None:
    bench = benches(job("a"), job("a", retry_count=1), slots=2)
    await bench.source.asked_times(2)
    await bench.settled(lambda: bench.executions["a"].job.retry_count == 1)
    first = bench.executions["a"]
    assert len(bench.dispatcher.running) == 1
    first.ended.set()
    await bench.settled(lambda: bench.reported)
    assert bench.reported[0][0].retry_count == 1, "the report answers for the new acceptance"


async def test_a_master_that_repeats_itself_is_not_hammered(benches: Callable[..., Bench]) -> None:
    bench = benches(*[job("a")] * 50, slots=2)
    await bench.source.asked_times(2)
    for _ in range(100):
        await asyncio.sleep(0)
    assert bench.source.asked == 2


async def test_a_live_job_that_may_go_stale_is_the_last_one_taken(
    benches: Callable[..., Bench],
) -> None:
    long = {"timeout_sec": 3600}
    bench = benches(job("a", queue="live", resource_limits=long), job("b"), slots=4)
    await bench.settled(lambda: "a" in bench.executions)
    for _ in range(20):
        await asyncio.sleep(0)
    assert bench.source.asked == 1
    bench.executions["a"].ended.set()
    await bench.settled(lambda: "b" in bench.executions)


async def test_a_short_live_job_keeps_nothing_waiting(benches: Callable[..., Bench]) -> None:
    bench = benches(job("a", queue="live"), job("b"), slots=4)
    await bench.settled(lambda: "b" in bench.executions)


async def test_stopping_ends_the_jobs_and_sees_the_reports_off(
    benches: Callable[..., Bench],
) -> None:
    bench = benches(job("a"), job("b"))
    await bench.settled(lambda: len(bench.executions) == 2)
    bench.dispatcher.stop_polling()
    await bench.dispatcher.stop(Intent.SHUTDOWN, asyncio.Event())
    assert {e.steps.intent for e in bench.executions.values()} == {Intent.SHUTDOWN}
    assert len(bench.reported) == 2
    assert bench.dispatcher.held == set()


async def test_a_hurried_stop_waits_for_no_report(
    benches: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    await bench.settled(lambda: "a" in bench.executions)
    hurry = asyncio.Event()
    hurry.set()
    bench.dispatcher.stop_polling()
    await bench.dispatcher.stop(Intent.SHUTDOWN, hurry)
    assert bench.reported == []
    assert bench.executions["a"].closed == 0, "the next run must find that it was not reported"
    assert "job a: the master did not take its result in time" in caplog.text


async def test_each_step_is_on_record(benches: Callable[..., Bench]) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    await bench.settled(lambda: "a" in bench.executions)
    assert bench.states() == ["accepted"]
    bench.executions["a"].ended.set()
    await bench.settled(lambda: bench.states() == ["finished"])
    bench.delivering.set()
    await bench.settled(lambda: bench.states() == ["reaped"])
    [entry] = bench.entries()
    assert (entry.settled, entry.evidence["unit"]) == ("delivered", "ffmpeg-job-a.service")


async def test_a_report_that_is_not_wanted_is_off_the_record_with_the_reason(
    benches: Callable[..., Bench],
) -> None:
    bench = benches(job("a"))
    bench.answer = Dropped("it is with node b")
    await bench.settled(lambda: "a" in bench.executions)
    bench.executions["a"].ended.set()
    await bench.settled(lambda: bench.states() == ["reaped"])
    assert [(e.settled, e.why) for e in bench.entries()] == [("dropped", "it is with node b")]


async def test_a_failed_report_on_the_way_is_dropped_for_a_new_acceptance(
    benches: Callable[..., Bench],
) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    await bench.settled(lambda: "a" in bench.executions)
    first = bench.executions["a"]
    bench.source.answers.append(job("a", retry_count=1))
    first.status = "failed"
    first.ended.set()
    await bench.settled(lambda: bench.executions["a"] is not first)
    assert first.closed == 1, "the folder must be free for the new run"
    bench.delivering.set()
    await bench.settled(lambda: bench.states() == ["reaped", "accepted"])
    assert bench.reported == []
    assert bench.entries()[0].why == "the job was handed out anew"


async def test_a_completed_report_on_the_way_answers_for_a_new_acceptance(
    benches: Callable[..., Bench],
) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    await bench.settled(lambda: "a" in bench.executions)
    first = bench.executions["a"]
    bench.source.answers.append(job("a", retry_count=1))
    first.ended.set()
    await bench.settled(lambda: [e.job.retry_count for e in bench.entries()] == [1])
    bench.delivering.set()
    await bench.settled(lambda: bench.states() == ["reaped"])
    assert bench.executions["a"] is first, "it was not run again"
    assert [(job.retry_count, result.status) for job, result in bench.reported] == [
        (1, "completed")
    ]


async def test_a_master_that_was_set_back_gets_the_same_result_again(
    benches: Callable[..., Bench],
) -> None:
    bench = benches(job("a", retry_count=0), poll_interval=0.01)
    await bench.settled(lambda: "a" in bench.executions)
    first = bench.executions["a"]
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
async def test_another_acceptance_of_the_same_id_is_run(
    benches: Callable[..., Bench], again: Job
) -> None:
    bench = benches(job("a", retry_count=0), poll_interval=0.01)
    await bench.settled(lambda: "a" in bench.executions)
    first = bench.executions["a"]
    first.ended.set()
    await bench.settled(lambda: bench.states() == ["reaped"])
    bench.source.answers.append(again)
    await bench.settled(lambda: bench.executions["a"] is not first)
    assert bench.states() == ["reaped", "accepted"]


async def test_a_job_that_cannot_be_put_on_record_is_handed_back(
    benches: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
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
    benches: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise LedgerError("disk full")

    bench = benches(job("a"))
    bench.delivering.clear()
    await bench.settled(lambda: "a" in bench.executions)
    monkeypatch.setattr(bench.ledger, "finish", full)
    bench.executions["a"].ended.set()
    await bench.settled(lambda: not bench.dispatcher.running)
    assert bench.executions["a"].done == []
    bench.delivering.set()
    await bench.settled(lambda: not bench.dispatcher.held)
    assert bench.executions["a"].done == ["released", "closed"]


@pytest.mark.parametrize("intent", [Intent.CANCELLED, Intent.GONE])
async def test_nothing_is_reported_of_a_job_that_is_not_wanted_any_more(
    benches: Callable[..., Bench], intent: Intent
) -> None:
    bench = benches(job("a"))
    await bench.settled(lambda: "a" in bench.executions)
    bench.executions["a"].stop(intent)
    await bench.settled(lambda: not bench.dispatcher.held)
    assert bench.states() == ["reaped"]
    assert bench.reported == []
    assert bench.entries()[0].settled == "dropped"
    assert bench.executions["a"].closed == 1
    assert (bench.metrics._active, bench.metrics._cancelled_graceful) == (0, 1)


async def test_a_job_handed_out_anew_while_it_is_being_stopped_is_run_again(
    benches: Callable[..., Bench],
) -> None:
    bench = benches(job("a"))
    await bench.settled(lambda: "a" in bench.executions)
    first = bench.executions["a"]
    first.steps.intent = Intent.CANCELLED  # told to stop, and not ended yet
    bench.source.answers.append(job("a", retry_count=1))
    bench.dispatcher.nudge()
    await bench.source.asked_times(3)
    assert bench.executions["a"] is first
    first.ended.set()
    await bench.settled(lambda: bench.executions["a"] is not first)
    assert bench.states() == ["reaped", "accepted"]
    assert bench.reported == []


async def test_a_defect_in_taking_a_job_costs_that_job_only(
    benches: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
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
    await bench.settled(lambda: "good" in bench.executions)


async def test_what_is_left_open_of_an_older_acceptance_is_dropped(
    benches: Callable[..., Bench],
) -> None:
    bench = benches()
    bench.ledger.accept(job("a", retry_count=0))
    bench.source.answers.append(job("a", retry_count=1))
    bench.dispatcher.nudge()
    await bench.settled(lambda: "a" in bench.executions)
    assert bench.states() == ["reaped", "accepted"]


async def test_leaving_changes_nothing(benches: Callable[..., Bench]) -> None:
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


@pytest.mark.parametrize(
    ("fields", "reported"),
    [({"retry_count": 2}, 1), ({"retry_count": 3}, 0), ({"retry_count": 2, "max_retries": 2}, 0)],
)
async def test_the_last_retry_is_not_handed_back_as_a_failure(
    benches: Callable[..., Bench], fields: dict[str, int], reported: int
) -> None:
    bench = benches(job("a", **fields))
    await bench.settled(lambda: "a" in bench.executions)
    await bench.dispatcher.stop(Intent.SHUTDOWN, asyncio.Event())
    assert len(bench.reported) == reported
    assert bench.dispatcher.left_to_the_master == (reported == 0)
    assert bench.entries()[0].why == ("" if reported else LEFT_TO_THE_MASTER)


async def test_a_report_that_is_cut_short_stays_on_record(benches: Callable[..., Bench]) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    await bench.settled(lambda: "a" in bench.executions)
    hurry = asyncio.Event()
    hurry.set()
    bench.dispatcher.stop_polling()
    await bench.dispatcher.stop(Intent.SHUTDOWN, hurry)
    assert bench.states() == ["finished"]


async def test_a_defect_in_reporting_keeps_the_job_ours(
    benches: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    bench = benches(job("a"))

    async def broken(*_args: object, **_options: object) -> Delivered | Dropped:
        raise RuntimeError("no")

    bench.dispatcher.reports._deliver = broken
    await bench.settled(lambda: "a" in bench.executions)
    bench.executions["a"].ended.set()
    await bench.settled(lambda: "reporting it failed" in caplog.text)
    assert bench.dispatcher.held == {"a"}
    assert bench.states() == ["finished"]


@pytest.mark.parametrize("where", ["making", "running"])
async def test_a_defect_costs_one_job_and_not_the_node(
    benches: Callable[..., Bench], where: str, caplog: pytest.LogCaptureFixture
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


async def test_a_repeated_hand_out_is_said_once_a_retry(
    benches: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    again = [job("a"), job("a"), job("a", retry_count=1), job("a", retry_count=1)]
    bench = benches(job("a"), *again, poll_interval=0.001)
    await bench.source.asked_times(6)
    assert [r.levelname for r in caplog.records].count("WARNING") == 2


async def test_a_job_that_does_not_end_does_not_hold_up_the_stop(
    benches: Callable[..., Bench],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.dispatch.LAST_JOBS_SEC", 0.01)
    bench = benches(job("a"))
    await bench.settled(lambda: "a" in bench.executions)
    bench.executions["a"].stop = lambda intent: None  # type: ignore[method-assign]
    async with asyncio.timeout(5):
        await bench.dispatcher.stop(Intent.SHUTDOWN, asyncio.Event())
    assert "could not be ended in time: a" in caplog.text
    assert bench.states() == ["accepted"], "the next run takes it up"
    assert bench.reported == []


async def test_a_node_that_cannot_report_takes_no_more_jobs(
    benches: Callable[..., Bench],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("worker.reports.MOST_UNDELIVERED", 1)
    bench = benches(job("a"), poll_interval=0.01)
    bench.delivering.clear()
    await bench.settled(lambda: "a" in bench.executions)
    bench.executions["a"].ended.set()
    await bench.settled(lambda: "taking no jobs: 1 results are not delivered" in caplog.text)
    asked = bench.source.asked
    for _ in range(20):
        await asyncio.sleep(0)
    assert bench.source.asked == asked
    bench.source.answers.append(job("b"))
    bench.delivering.set()
    await bench.settled(lambda: "b" in bench.executions)
