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

from worker.errors import MasterRefused, MasterUnreachable, Reason, Unauthorized
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
LAST_JOBS_SEC = 25.0
"""A job has 10 s between SIGTERM and SIGKILL; what takes longer is stuck, or systemd is away."""
LAST_REPORTS_SEC = 20.0
MOST_UNDELIVERED = 100
"""A node that cannot report takes no more jobs than this: they are lost time for all."""


class Source(Protocol):
    """Where jobs come from (``worker.master.session.NodeSession``)."""

    registered: bool

    async def next_job(self, held: Collection[str] | None = None) -> Job | None: ...


class Records(Protocol):
    """What outlives the agent (``worker.leftovers.Records``)."""

    def accepted(self, job: Job) -> None: ...
    def ended(self, job: Job, result: JobResult) -> None: ...
    def settled(self, job: Job) -> None: ...


class Deliver(Protocol):
    """Returns when the result has arrived, or is not wanted any more."""

    def __call__(
        self, job: Job, result: JobResult, *, maybe_landed: bool
    ) -> Coroutine[None, None, object]: ...


@dataclass(slots=True)
class Held:
    """A job whose report is on its way."""

    job: Job
    release: Callable[[], None]
    superseded: bool = False
    """The job was handed out anew: what is on record of it is not about this report."""


class Dispatcher:
    """``blocked`` says why no jobs are to be taken now, or is empty."""

    def __init__(
        self,
        *,
        slots: int,
        poll_interval: float,
        source: Source,
        execute: Callable[[Job], Execution],
        deliver: Deliver,
        records: Records,
        blocked: Callable[[], str],
        metrics: Metrics,
    ) -> None:
        self.slots = slots
        self.running: dict[str, Execution] = {}
        self.changed = asyncio.Event()
        """Set when ``running`` changes; whoever waits for it clears it."""
        self._poll_interval = poll_interval
        self._source = source
        self._execute = execute
        self._deliver = deliver
        self._records = records
        self._blocked = blocked
        self._metrics = metrics
        self._jobs: set[asyncio.Task[None]] = set()
        self._reports: dict[asyncio.Task[object], Held] = {}
        self._stuck: set[str] = set()
        self._repeated: set[str] = set()
        self._slot_freed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._complaint = Throttle()

    @property
    def held(self) -> set[str]:
        """Ids of the jobs that run here or whose report has not arrived yet."""
        return {*self.running, *(held.job.id for held in self._reports.values()), *self._stuck}

    async def run(self) -> None:
        """Poll until stop() is called."""
        soon = Backoff(1.0, 60.0)
        slow = Backoff(30.0, 270.0, floor=30.0)
        while not self._stopping.is_set():
            self._slot_freed.clear()
            if len(self.running) >= self.slots or self._exclusive():
                await self._pause(None, slot=True)
                continue
            if reason := self._blocked() or self._too_many_undelivered():
                if self._complaint.due():
                    logger.warning("taking no jobs: %s", reason)
                await self._pause(self._poll_interval)
                continue
            try:
                job = await self._source.next_job(self.held)
            except (MasterUnreachable, MasterRefused) as error:
                backoff = slow if isinstance(error, Unauthorized) else soon
                wait = backoff.next(error.retry_after)
                logger.debug("asking for jobs again in %.0f s", wait)  # the source says why
                await self._pause(wait)
                continue
            soon.reset()
            slow.reset()
            self._complaint.relax()
            if job is None or not self._accept(job):
                await self._pause(self._poll_interval, slot=True)

    def stop_polling(self) -> None:
        """Take no more jobs and tell those that run to end.

        run() returns as soon as the request under way is answered.
        """
        self._stopping.set()
        for execution in self.running.values():
            execution.stop(Intent.SHUTDOWN)

    async def stop(self, hurry: asyncio.Event) -> None:
        """See the jobs end and their reports off, for as long as a service may take to stop.

        ``hurry`` cuts the waiting for reports short. What is not off by then is on record.
        """
        self.stop_polling()
        if self._jobs:
            _, stuck = await asyncio.wait(self._jobs, timeout=LAST_JOBS_SEC)
            if stuck:
                logger.error("jobs that could not be ended in time: %s", ", ".join(self.running))
                for task in stuck:
                    task.cancel()
                await asyncio.wait(stuck, timeout=1.0)
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
            logger.error(
                "job %s: the master did not take its result in time; it is sent when the worker "
                "runs again", held.job.id,
            )  # fmt: skip
            report.cancel()
        await asyncio.gather(*reports, return_exceptions=True)

    def report(
        self,
        job: Job,
        result: JobResult,
        release: Callable[[], None] | None = None,
        *,
        maybe_landed: bool = False,
    ) -> None:
        """See a result off; ``release`` is called when the master has it."""
        self._records.ended(job, result)
        delivery = self._deliver(job, result, maybe_landed=maybe_landed)
        report = asyncio.create_task(delivery, name=f"report of {job.id}")
        self._reports[report] = Held(job, release or _nothing)
        report.add_done_callback(self._reported)
        self._metrics.set_undelivered(len(self._reports))

    def _accept(self, job: Job) -> bool:
        """Start a job; False if it runs here already."""
        self._records.accepted(job)
        if running := self.running.get(job.id):
            # The master queued it again although it runs here, e.g. after 30 minutes. It is not
            # started twice: what runs now answers for the new acceptance.
            news = job.retry_count != running.job.retry_count or job.id not in self._repeated
            self._repeated.add(job.id)
            logger.log(
                logging.WARNING if news else logging.DEBUG,
                "job %s was handed out again (retry %d) while it runs here; going on with it",
                job.id, job.retry_count,
            )  # fmt: skip
            running.job = job
            return False
        for held in self._reports.values():
            if held.job.id == job.id and not held.superseded:
                held.superseded = True  # whatever becomes of that report is past
                held.release()
        self._stuck.discard(job.id)
        self._metrics.job_started()
        try:
            execution = self._execute(job)
        except Exception as error:
            logger.exception("job %s: internal error", job.id)
            self._metrics.job_finished(Reason.PLATFORM_ERROR)
            self.report(job, defect(job, error))
            return True
        self.running[job.id] = execution
        self.changed.set()
        if self._stopping.is_set():
            execution.stop(Intent.SHUTDOWN)
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
        failed = False
        try:
            result = await execution.run()
        except Exception as error:
            logger.exception("job %s: internal error", execution.job.id)
            result, failed = defect(execution.job, error), True
        finally:
            if stale is not None:
                stale.cancel()
            del self.running[execution.job.id]
            self._repeated.discard(execution.job.id)
            self._slot_freed.set()
            self.changed.set()
        self.report(execution.job, result, execution.close)
        if failed:
            self._metrics.job_finished(Reason.PLATFORM_ERROR)
        else:
            count(self._metrics, execution)

    def _reported(self, report: asyncio.Task[object]) -> None:
        held = self._reports.pop(report)
        self._metrics.set_undelivered(len(self._reports))
        if held.superseded or report.cancelled():
            return  # what was cancelled is on record for the next run
        if error := report.exception():
            # A defect of ours. The job stays ours, or it would be taken for one never heard of.
            logger.error("job %s: reporting it failed", held.job.id, exc_info=error)
            self._stuck.add(held.job.id)
            return
        held.release()
        self._records.settled(held.job)

    def _too_many_undelivered(self) -> str:
        count = len(self._reports)
        return f"{count} results are not delivered yet" if count >= MOST_UNDELIVERED else ""

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

    async def _pause(self, seconds: float | None, *, slot: bool = False) -> None:
        """Wait for the time to pass, for stop(), and with ``slot`` for a slot that frees."""
        events = [self._stopping, *([self._slot_freed] if slot else [])]
        waiting = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait(waiting, timeout=seconds, return_when="FIRST_COMPLETED")
        finally:
            for task in waiting:
                task.cancel()


def _nothing() -> None:
    """There is nothing to release."""


def defect(job: Job, error: Exception) -> JobResult:
    """The result of a job that an error of ours has ended."""
    return JobResult(
        job_id=job.id,
        node_id=job.node_id,
        status="failed",
        metrics={"failure_reason": Reason.PLATFORM_ERROR.value},
        error=f"{Reason.PLATFORM_ERROR}: internal error: {type(error).__name__}",
    )


def count(metrics: Metrics, execution: Execution) -> None:
    """Count a job that has ended."""
    for seconds in execution.steps.start_seconds:
        metrics.unit_started(seconds)
    facts, outcome = execution.facts, execution.outcome
    if facts is None or outcome is None:
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
