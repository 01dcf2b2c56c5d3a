"""Fills free slots with jobs and sees every result on its way.

A slot that frees polls at once, free slots fill in one burst, and only an empty answer waits
for the poll interval. A job is held from its acceptance until its report has arrived.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import Protocol

from worker.errors import MasterError, MasterRefused, MasterUnreachable, Reason, Unauthorized
from worker.execution import Execution
from worker.jobs.outcome import Intent
from worker.jobs.report import bandwidth_mbps, verdict_of
from worker.jobs.spec import Queue
from worker.master.retry import Backoff, Throttle
from worker.master.wire import Job, JobResult
from worker.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

LIVE_STALE_SEC = 300
"""The master takes a live job back when it has heard nothing of it for so long."""
BATCH_STALE_SEC = 1800
"""The master queues a default or batch job again when it has run for so long."""
LAST_POLL_SEC = 5.0
LAST_REPORTS_SEC = 20.0


class Source(Protocol):
    """Where jobs come from (``worker.master.session.NodeSession``)."""

    registered: bool

    async def next_job(self, held: Collection[str] | None = None) -> Job | None: ...


@dataclass(frozen=True, slots=True)
class Held:
    """A job whose report is on its way."""

    job_id: str
    release: Callable[[], None]


class Dispatcher:
    """``blocked`` says why no jobs are to be taken now, or is empty."""

    def __init__(
        self,
        *,
        slots: int,
        poll_interval: float,
        source: Source,
        execute: Callable[[Job], Execution],
        deliver: Callable[[Job, JobResult], Coroutine[None, None, object]],
        blocked: Callable[[], str],
        metrics: Metrics,
    ) -> None:
        self.slots = slots
        self.running: dict[str, Execution] = {}
        self._poll_interval = poll_interval
        self._source = source
        self._execute = execute
        self._deliver = deliver
        self._blocked = blocked
        self._metrics = metrics
        self._jobs: set[asyncio.Task[None]] = set()
        self._reports: dict[asyncio.Task[object], Held] = {}
        self._slot_freed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._complaint = Throttle()

    @property
    def held(self) -> set[str]:
        """Ids of the jobs that run here or whose report has not arrived yet."""
        return {*self.running, *(held.job_id for held in self._reports.values())}

    async def run(self) -> None:
        """Poll until stop() is called."""
        soon = Backoff(1.0, 60.0)
        slow = Backoff(30.0, 270.0, floor=30.0)
        while not self._stopping.is_set():
            self._slot_freed.clear()
            if len(self.running) >= self.slots or self._exclusive():
                await self._pause(None, slot=True)
                continue
            if reason := self._blocked():
                if self._complaint.due():
                    logger.warning("taking no jobs: %s", reason)
                await self._pause(self._poll_interval)
                continue
            try:
                job = await self._source.next_job(self.held)
            except (MasterUnreachable, MasterRefused) as error:
                self._metrics.set_master_up(False)
                backoff = slow if isinstance(error, Unauthorized) else soon
                await self._failed(error, backoff.next(error.retry_after))
                continue
            self._metrics.set_master_up(True)
            soon.reset()
            slow.reset()
            if job is None or not self._accept(job):
                await self._pause(self._poll_interval, slot=True)

    def stop_polling(self) -> None:
        """Take no more jobs; run() returns as soon as the request under way is answered."""
        self._stopping.set()

    async def stop(self, hurry: asyncio.Event) -> None:
        """End the jobs that run, and see their reports off.

        ``hurry`` cuts the waiting for reports short.
        """
        self._stopping.set()
        for execution in self.running.values():
            execution.stop(Intent.SHUTDOWN)
        if self._jobs:
            await asyncio.wait(self._jobs)
        reports = [*self._reports]
        if reports and not hurry.is_set():
            hurried = asyncio.create_task(hurry.wait())
            everything = asyncio.create_task(asyncio.wait(reports))
            await asyncio.wait(
                (hurried, everything), timeout=LAST_REPORTS_SEC, return_when="FIRST_COMPLETED"
            )
            hurried.cancel()
            everything.cancel()
        for report, held in self._reports.items():
            logger.error("job %s: the master did not take its result in time", held.job_id)
            report.cancel()
        await asyncio.gather(*reports, return_exceptions=True)

    def report(self, job: Job, result: JobResult, release: Callable[[], None]) -> None:
        """See a result off; ``release`` is called when the master has it."""
        report = asyncio.create_task(self._deliver(job, result), name=f"report of {job.id}")
        self._reports[report] = Held(job.id, release)
        report.add_done_callback(self._reported)
        self._metrics.set_undelivered(len(self._reports))

    def _accept(self, job: Job) -> bool:
        """Start a job; False if it runs here already."""
        if held := self.running.get(job.id):
            # The master queued it again although it runs here, e.g. after 30 minutes. It is not
            # started twice: what runs now answers for the new acceptance.
            logger.warning(
                "job %s was handed out again (retry %d) while it runs here; going on with it",
                job.id, job.retry_count,
            )  # fmt: skip
            held.job = job
            return False
        for report in self._reports.values():
            if report.job_id == job.id:
                report.release()  # handed out anew, so whatever became of that report is past
        execution = self._execute(job)
        self.running[job.id] = execution
        if self._stopping.is_set():
            execution.stop(Intent.SHUTDOWN)
        self._metrics.job_started()
        task = asyncio.create_task(self._work(execution), name=f"job {job.id}")
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
        return True

    async def _work(self, execution: Execution) -> None:
        stale = None
        if execution.spec is not None and execution.spec.queue is not Queue.LIVE:
            stale = asyncio.get_running_loop().call_later(
                BATCH_STALE_SEC,
                logger.warning,
                "job %s has run for 30 minutes: the master now takes it for stale and hands it "
                "out again; it goes on here",
                execution.job.id,
            )
        try:
            result = await execution.run()
        finally:
            if stale is not None:
                stale.cancel()
            del self.running[execution.job.id]
            count(self._metrics, execution)
            self._slot_freed.set()
        self.report(execution.job, result, execution.close)

    def _reported(self, report: asyncio.Task[object]) -> None:
        held = self._reports.pop(report)
        self._metrics.set_undelivered(len(self._reports))
        if report.cancelled():
            return  # the next run of the agent finds what was kept of the job
        if error := report.exception():
            logger.error("job %s: reporting it failed", held.job_id, exc_info=error)
        held.release()

    def _exclusive(self) -> bool:
        """A live job that can go stale is the last one taken, and alone of its kind.

        Heartbeats keep only the job fresh that was taken last, so taking another one would
        have the live job given away after five minutes.
        """
        for execution in self.running.values():
            spec = execution.spec
            if spec and spec.queue is Queue.LIVE and spec.limits.timeout_sec >= LIVE_STALE_SEC:
                return True
        return False

    async def _failed(self, error: MasterError, wait: float) -> None:
        logger.log(
            logging.WARNING if self._complaint.due() else logging.DEBUG,
            "cannot ask for jobs, next attempt in %.0f s: %s", wait, error,
        )  # fmt: skip
        await self._pause(wait)

    async def _pause(self, seconds: float | None, *, slot: bool = False) -> None:
        """Wait for the time to pass, for stop(), and with ``slot`` for a slot that frees."""
        events = [self._stopping, *([self._slot_freed] if slot else [])]
        waiting = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait(waiting, timeout=seconds, return_when="FIRST_COMPLETED")
        finally:
            for task in waiting:
                task.cancel()


def count(metrics: Metrics, execution: Execution) -> None:
    """Count a job that has ended."""
    for seconds in execution.steps.start_seconds:
        metrics.unit_started(seconds)
    facts, outcome = execution.facts, execution.outcome
    if facts is None or outcome is None:  # its task was cancelled
        metrics.job_finished(Reason.PLATFORM_ERROR)
        return
    if facts.generation_sec is not None and facts.input_bytes is not None:
        metrics.input_generated(facts.generation_sec, facts.input_bytes)
    verdict = verdict_of(facts, outcome)
    metrics.job_finished(
        outcome.reason,
        sla_compliant=verdict.compliant if verdict.worthy else None,
        input_bytes=facts.input_bytes,
        output_bytes=facts.output_bytes,
        bandwidth_mbps=bandwidth_mbps(facts),
    )
