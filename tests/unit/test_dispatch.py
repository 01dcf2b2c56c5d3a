"""Slots: when jobs are asked for, how many run, what is held, and how it all ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, cast

import pytest

from worker.dispatch import Dispatcher
from worker.errors import MasterRefused, MasterUnreachable
from worker.execution import Execution
from worker.jobs.outcome import Intent
from worker.jobs.spec import Limits, Queue
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
        self.intents: list[Intent] = []
        self.closed = 0
        self.outcome = self.facts = None
        self.steps = type("Steps", (), {"start_seconds": []})()

    async def run(self) -> JobResult:
        await self.ended.wait()
        return JobResult(job_id=self.job.id, node_id="n", status="completed")

    def stop(self, intent: Intent) -> None:
        self.intents.append(intent)
        self.ended.set()

    def close(self) -> None:
        self.closed += 1


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


class Record:
    """What is on record, and all that was noted, in order."""

    def __init__(self) -> None:
        self.now: dict[str, JobResult | None] = {}
        self.notes: list[str] = []

    def accepted(self, job: Job) -> None:
        self.now[job.id] = None
        self.notes.append(f"accepted {job.id}")

    def ended(self, job: Job, result: JobResult) -> None:
        self.now[job.id] = result
        self.notes.append(f"ended {job.id}")

    def settled(self, job: Job) -> None:
        del self.now[job.id]
        self.notes.append(f"settled {job.id}")


class Bench:
    def __init__(self, slots: int, poll_interval: float) -> None:
        self.source = FakeSource()
        self.executions: dict[str, FakeExecution] = {}
        self.reported: list[tuple[Job, JobResult]] = []
        self.delivering = asyncio.Event()
        self.delivering.set()
        self.reason = ""
        self.records = Record()
        self.metrics = Metrics("node", 1)
        self.dispatcher = Dispatcher(
            slots=slots,
            poll_interval=poll_interval,
            source=self.source,
            execute=self.execute,
            deliver=self.deliver,
            records=self.records,
            blocked=lambda: self.reason,
            metrics=self.metrics,
        )

    def execute(self, job: Job) -> Execution:
        execution = self.executions[job.id] = FakeExecution(job)
        return cast("Execution", execution)

    async def deliver(self, job: Job, result: JobResult, *, maybe_landed: bool = False) -> None:
        await self.delivering.wait()
        self.reported.append((job, result))

    async def settled(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0)


@pytest.fixture
async def benches() -> AsyncIterator[Callable[..., Bench]]:
    tasks: list[tuple[Bench, asyncio.Task[None]]] = []

    def make(*answers: Job | Exception, slots: int = 2, poll_interval: float = 3600.0) -> Bench:
        bench = Bench(slots, poll_interval)
        bench.source.answers += answers
        tasks.append((bench, asyncio.create_task(bench.dispatcher.run())))
        return bench

    yield make
    for bench, task in tasks:
        bench.delivering.set()
        bench.dispatcher.stop_polling()
        await task
        await bench.dispatcher.stop(asyncio.Event())


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
    assert execution.closed == 1
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


async def test_a_job_handed_out_again_while_its_report_is_on_the_way_is_a_new_one(
    benches: Callable[..., Bench],
) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    await bench.settled(lambda: "a" in bench.executions)
    first = bench.executions["a"]
    bench.source.answers.append(job("a", retry_count=1))
    first.ended.set()
    await bench.settled(lambda: bench.executions["a"] is not first)
    assert first.closed == 1, "the folder must be free for the new run"


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
    await bench.dispatcher.stop(asyncio.Event())
    assert {intent for e in bench.executions.values() for intent in e.intents} == {Intent.SHUTDOWN}
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
    await bench.dispatcher.stop(hurry)
    assert bench.reported == []
    assert bench.executions["a"].closed == 0, "the next run must find that it was not reported"
    assert "job a: the master did not take its result in time" in caplog.text


async def test_a_job_is_on_record_from_acceptance_to_report(benches: Callable[..., Bench]) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    await bench.settled(lambda: "a" in bench.executions)
    assert bench.records.now == {"a": None}
    bench.executions["a"].ended.set()
    await bench.settled(lambda: bench.records.now["a"])
    bench.delivering.set()
    await bench.settled(lambda: not bench.records.now)
    assert bench.records.notes == ["accepted a", "ended a", "settled a"]


async def test_an_old_report_does_not_take_a_new_acceptance_off_the_record(
    benches: Callable[..., Bench],
) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    await bench.settled(lambda: "a" in bench.executions)
    first = bench.executions["a"]
    bench.source.answers.append(job("a", retry_count=1))
    first.ended.set()
    await bench.settled(lambda: bench.executions["a"] is not first)
    bench.delivering.set()
    await bench.settled(lambda: bench.reported)
    await asyncio.sleep(0)
    assert bench.records.now == {"a": None}
    assert first.closed == 1


async def test_a_report_that_is_cut_short_stays_on_record(benches: Callable[..., Bench]) -> None:
    bench = benches(job("a"))
    bench.delivering.clear()
    await bench.settled(lambda: "a" in bench.executions)
    hurry = asyncio.Event()
    hurry.set()
    bench.dispatcher.stop_polling()
    await bench.dispatcher.stop(hurry)
    assert bench.records.now["a"] is not None


async def test_a_defect_in_reporting_keeps_the_job_ours(
    benches: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    bench = benches(job("a"))

    async def broken(*_args: object, **_options: object) -> None:
        raise RuntimeError("no")

    bench.dispatcher._deliver = broken
    await bench.settled(lambda: "a" in bench.executions)
    bench.executions["a"].ended.set()
    await bench.settled(lambda: "reporting it failed" in caplog.text)
    assert bench.dispatcher.held == {"a"}
    assert bench.records.now["a"] is not None


@pytest.mark.parametrize("where", ["making", "running"])
async def test_a_defect_costs_one_job_and_not_the_node(
    benches: Callable[..., Bench], where: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = benches(slots=2)
    await bench.source.asked_times(1)
    plain = bench.execute

    def execute(job: Job) -> Execution:
        if job.id == "bad" and where == "making":
            raise RecursionError("too deep")
        execution = plain(job)
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
        await bench.dispatcher.stop(asyncio.Event())
    assert "could not be ended in time: a" in caplog.text
    assert bench.records.now == {"a": None}, "the next run reports it"
    assert bench.reported == []


async def test_a_node_that_cannot_report_takes_no_more_jobs(
    benches: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.dispatch.MOST_UNDELIVERED", 1)
    bench = benches(job("a"), poll_interval=0.01)
    bench.delivering.clear()
    await bench.settled(lambda: "a" in bench.executions)
    bench.executions["a"].ended.set()
    await bench.settled(lambda: bench.records.now["a"])
    asked = bench.source.asked
    for _ in range(20):
        await asyncio.sleep(0)
    assert bench.source.asked == asked
    bench.source.answers.append(job("b"))
    bench.delivering.set()
    await bench.settled(lambda: "b" in bench.executions)
