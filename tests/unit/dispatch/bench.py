"""A dispatcher whose master, executions and deliveries do what a test tells them to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any, cast

from worker.acceptance import Acceptance
from worker.dispatch import Dispatcher
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
    """A dispatcher at work, and all that it has to do with."""

    def __init__(self, ledger: Ledger, slots: int, poll_interval: float) -> None:
        self.source = FakeSource()
        self.ledger = ledger
        self.answer: Delivered | Dropped = Delivered(None)
        self.executions: dict[str, FakeExecution] = {}
        self.reported: list[tuple[Job, JobResult]] = []
        self.deliveries = 0
        """How many were begun."""
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
        self.deliveries += 1
        await self.delivering.wait()
        self.reported.append((job, result))
        return self.answer

    def entries(self) -> list[Entry]:
        """All that is on record, oldest first."""
        return self.ledger.recent(100)[::-1]

    def states(self) -> list[str]:
        return [entry.state.value for entry in self.entries()]

    async def begun(self, job_id: str) -> FakeExecution:
        """The execution of it, once there is one."""
        await self.settled(lambda: job_id in self.executions)
        return self.executions[job_id]

    async def stop(self, *, hurried: bool = False) -> None:
        hurry = asyncio.Event()
        if hurried:
            hurry.set()
        self.dispatcher.stop_polling()
        await self.dispatcher.stop(Intent.SHUTDOWN, hurry)

    async def settled(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0)


def job(job_id: str, **fields: Any) -> Job:
    return Job(id=job_id, **fields)


async def a_while(turns: int = 20) -> None:
    """Enough turns of the event loop for what must not happen to happen."""
    for _ in range(turns):
        await asyncio.sleep(0)


Benches = Callable[..., Bench]
