"""Fills free slots with jobs.

A slot that frees polls at once, free slots fill in one burst, and only an empty answer waits
for the poll interval. A job is held from its acceptance until its report has arrived; what is
held is on record (worker.acceptance), each step before the next one acts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Protocol

from worker.acceptance import Acceptance, Unrecorded
from worker.control import News
from worker.errors import LedgerError, MasterRefused, MasterUnreachable, Reason, Unauthorized
from worker.execution import Execution
from worker.jobs.outcome import Intent
from worker.jobs.report import bandwidth_mbps, verdict_of
from worker.jobs.spec import Queue
from worker.ledger import Entry, Ledger, State
from worker.master.retry import Backoff, Throttle
from worker.master.wire import Job, JobResult
from worker.reports import Deliver, Reports, cancelled, defect, failed
from worker.telemetry.metrics import Metrics
from worker.telemetry.pulse import Pulse

logger = logging.getLogger(__name__)

LIVE_STALE_SEC = 300
"""The master takes a live job back when it has heard nothing of it for so long."""
BATCH_STALE_SEC = 1800
"""The master queues a default or batch job again when it has run for so long."""
LAST_JOBS_SEC = 25.0
"""A job has 10 s between SIGTERM and SIGKILL; what takes longer is stuck, or systemd is away."""
LEAVING_SEC = 5.0
REQUEST_SEC = 180.0
"""No request to the master, with all that belongs to it, takes longer."""
MAX_RETRIES = 3
"""What masters do by default, for those that do not say it."""
LEFT_TO_THE_MASTER = "left to the master, which gives it away when this node is silent for 90 s"


class Source(Protocol):
    """Where jobs come from (``worker.master.session.NodeSession``)."""

    registered: bool

    async def next_job(self, held: Collection[str] | None = None) -> Job | None: ...


class Dispatcher:
    """``blocked`` says why no jobs are to be taken now, or is empty."""

    def __init__(
        self,
        *,
        slots: int,
        poll_interval: float,
        execute: Callable[[Acceptance], Execution],
        deliver: Deliver,
        ledger: Ledger,
        blocked: Callable[[], str],
        metrics: Metrics,
        pulse: Pulse | None = None,
    ) -> None:
        self.slots = slots
        self.running: dict[str, Execution] = {}
        self.changed = asyncio.Event()
        """Set when ``running`` changes; whoever waits for it clears it."""
        self.news = News()
        """Told of the same changes, for any number of listeners."""
        self.asking = False
        """The master was asked for a job, and has not answered."""
        self.left_to_the_master = False
        """A job was stopped and not reported, so that the master gives it away by itself."""
        self._poll_interval = poll_interval
        self._execute = execute
        self.reports = Reports(deliver, self._undelivered)
        self._ledger = ledger
        self._blocked = blocked
        self._metrics = metrics
        self._pulse = pulse or Pulse()
        self._acceptances: dict[str, Acceptance] = {}
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._repeated: set[str] = set()
        self._slot_freed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = asyncio.Event()
        self._leaving = False
        self._complaint = Throttle()

    @property
    def held(self) -> set[str]:
        """Ids of the jobs that run here or whose report has not arrived yet."""
        return {*self.running, *self.reports.jobs}

    def tell_change(self) -> None:
        """What runs, or what is owed, is no longer what it was."""
        self.changed.set()
        self.news.tell()

    async def run(self, source: Source) -> None:
        """Poll until stop_polling() is called."""
        soon = Backoff(1.0, 60.0)
        slow = Backoff(30.0, 270.0, floor=30.0)
        while not self._stopping.is_set():
            self._slot_freed.clear()
            if len(self.running) >= self.slots or self._exclusive():
                await self._pause(None, slot=True)
                continue
            if reason := self._blocked() or self.reports.too_many:
                if self._complaint.due():
                    logger.warning("taking no jobs: %s", reason)
                await self._pause(self._poll_interval, slot=True)
                continue
            self.asking = True
            # As long as the master is away this may register in vain. Each request has its time
            # limit, and the heartbeats promise to go on registering.
            self._pulse.parked("polling")
            try:
                job = await source.next_job(self.held)
                self._pulse.beat("polling", within=REQUEST_SEC)
                taken = job is not None and await self._accept(job)
            except (MasterUnreachable, MasterRefused) as error:
                backoff = slow if isinstance(error, Unauthorized) else soon
                wait = backoff.next(error.retry_after)
                logger.debug("asking for jobs again in %.0f s", wait)  # the source says why
                self._answer_came()
                await self._pause(wait)
                continue
            self._answer_came()
            soon.reset()
            slow.reset()
            self._complaint.relax()
            if not taken:
                await self._pause(self._poll_interval, slot=True)
        self._pulse.parked("polling")

    def _undelivered(self, count: int) -> None:
        self._metrics.set_undelivered(count)
        self.tell_change()

    def nudge(self) -> None:
        """What kept jobs from being taken is over, perhaps: look at once."""
        self._slot_freed.set()

    def _answer_came(self) -> None:
        self.asking = False
        self.news.tell()

    # --- the end

    def stop_polling(self) -> None:
        """Take no more jobs: run() returns as soon as the request under way is answered."""
        self._stopping.set()

    async def idle(self) -> None:
        """Wait until no job runs here."""
        await self._idle.wait()

    async def leave(self) -> None:
        """Let go of everything as it is: jobs run on, and what is owed is on record."""
        self.stop_polling()
        self._leaving = True
        for execution in self.running.values():
            execution.leave()
        if self._jobs:
            _, busy = await asyncio.wait(self._jobs.values(), timeout=LEAVING_SEC)
            await cancelled(busy)
        await self.reports.leave()

    async def stop(self, intent: Intent, hurry: asyncio.Event) -> None:
        """End the jobs and see their reports off, for as long as a service may take to stop.

        ``hurry`` cuts the waiting for reports short. What is not off by then is on record.
        """
        self.stop_polling()
        for execution in self.running.values():
            execution.stop(intent)
        if self._jobs:
            _, stuck = await asyncio.wait(self._jobs.values(), timeout=LAST_JOBS_SEC)
            if stuck:
                logger.error("jobs that could not be ended in time: %s", ", ".join(self.running))
                await cancelled(stuck)
        await self.reports.finish(hurry)

    # --- taking jobs

    async def _accept(self, job: Job) -> bool:
        """Put a job on record and start it; False if there was nothing to start."""
        if running := self.running.get(job.id):
            if running.steps.intent is Intent.NONE:
                await self._go_on(running, job)
                return False
            # It is being stopped, so it cannot answer for this.
            await asyncio.wait({self._jobs[job.id]})
        try:
            if await self.reports.answer(job):
                return False
            entry = await self._ledger.run(self._put_on_record, job)
        except LedgerError as error:
            logger.error("job %s cannot be taken: %s", job.id, error)
            self.reports.add(Unrecorded(job), failed(job, f"the worker cannot take jobs: {error}"))
            return False
        except Exception as error:  # costs this job, not the node
            logger.exception("job %s: internal error", job.id)
            self.reports.add(Unrecorded(job), defect(job, error))
            return False
        if entry.result is not None or entry.steps:
            return self._repeat(entry, job)
        self.start(Acceptance(self._ledger, entry))
        return True

    def _put_on_record(self, job: Job) -> Entry:
        """The entry of the acceptance: a new one unless this very acceptance is known.

        Runs in the ledger's thread.
        """
        known = self._ledger.find(job) if job.counts_retries else None
        if known and (known.result or known.steps or known.state is State.ACCEPTED):
            return known
        entry = self._ledger.accept(job)
        self._ledger.supersede(entry.id)  # of which nothing runs: reports are dealt with
        return entry

    async def _go_on(self, running: Execution, job: Job) -> None:
        """The master queued a job again although it runs here, e.g. after 30 minutes.

        It is not started twice: what runs now answers for the new acceptance.
        """
        news = job.retry_count != running.job.retry_count or job.id not in self._repeated
        self._repeated.add(job.id)
        logger.log(
            logging.WARNING if news else logging.DEBUG,
            "job %s was handed out again (retry %d) while it runs here; going on with it",
            job.id, job.retry_count,
        )  # fmt: skip
        running.job = job
        try:
            await self._acceptances[job.id].reissue(job)
        except LedgerError as error:
            logger.error("job %s: its new acceptance is not on record: %s", job.id, error)

    def _repeat(self, known: Entry, job: Job) -> bool:
        """The very acceptance is on record: a master that was set back hands it out once more.

        What it came to then is what it comes to now. Always False: a master that goes on so
        is asked at the pace of the poll interval.
        """
        logger.warning(
            "job %s (retry %d) was run here before; reporting what came of it instead of running "
            "it again", job.id, job.retry_count,
        )  # fmt: skip
        result = known.result or failed(job, "the job was begun here before, and given up")
        self.reports.add(Unrecorded(job), result.model_copy(update={"node_id": job.node_id}))
        return False

    def start(self, acceptance: Acceptance) -> None:
        """Run a job that is on record, from its beginning or from where it is."""
        job = acceptance.job
        self._metrics.job_started()
        try:
            execution = self._execute(acceptance)
        except Exception as error:
            logger.exception("job %s: internal error", job.id)
            self._metrics.job_finished(Reason.PLATFORM_ERROR)
            self.reports.add(acceptance, defect(job, error))
            return
        self.running[job.id] = execution
        self._acceptances[job.id] = acceptance
        self._idle.clear()
        self.tell_change()
        task = asyncio.create_task(self._work(execution, acceptance), name=f"job {job.id}")
        self._jobs[job.id] = task
        if self._leaving:
            execution.leave()

    async def _work(self, execution: Execution, acceptance: Acceptance) -> None:
        stale = None
        if execution.spec is not None and execution.spec.queue is not Queue.LIVE:
            stale = asyncio.get_running_loop().call_later(
                BATCH_STALE_SEC,
                logger.warning,
                "job %s has run for 30 minutes: the master now takes it for stale and hands it "
                "out again; it goes on here",
                execution.job.id,
            )
        why = ""
        try:
            result = await self._result(execution)
            if result is not None:
                # Where it cannot be noted, the unit and the files are the only record of the job.
                if await acceptance.finish(result, execution.evidence()):
                    await execution.release()
                if why := _not_to_be_reported(execution, result):
                    logger.warning("job %s: not reported: %s", execution.job.id, why)
                    self.left_to_the_master |= why == LEFT_TO_THE_MASTER
                    await self.reports.put_away(acceptance, execution, "dropped", why)
        finally:
            if stale is not None:
                stale.cancel()
            for held in (self.running, self._jobs, self._acceptances):
                held.pop(execution.job.id, None)
            self._repeated.discard(execution.job.id)
            self._slot_freed.set()
            self.tell_change()
            if not self.running:
                self._idle.set()
        if result is not None:
            if not why:
                self.reports.add(acceptance, result, execution)
            count(self._metrics, execution)

    async def _result(self, execution: Execution) -> JobResult | None:
        try:
            return await execution.run()
        except Exception as error:
            logger.exception("job %s: internal error", execution.job.id)
            return defect(execution.job, error)

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
        if seconds is None:
            self._pulse.parked("polling")
        else:
            self._pulse.beat("polling", within=seconds + REQUEST_SEC)
        events = [self._stopping, *([self._slot_freed] if slot else [])]
        waiting = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait(waiting, timeout=seconds, return_when="FIRST_COMPLETED")
        finally:
            for task in waiting:
                task.cancel()
            self._pulse.beat("polling", within=REQUEST_SEC)


def _not_to_be_reported(execution: Execution, result: JobResult) -> str:
    """Why the master is not to hear of a result; empty if it is."""
    match execution.steps.intent:
        case Intent.CANCELLED:
            return "the job was cancelled"
        case Intent.GONE:
            return "the job is no longer ours"
        case Intent.SHUTDOWN | Intent.POWEROFF if result.status != "completed":
            job = execution.job
            last = MAX_RETRIES if job.max_retries is None else job.max_retries
            # Its failure would be final; the master's own rule knows no last retry.
            return LEFT_TO_THE_MASTER if job.retry_count >= last else ""
    return ""


def count(metrics: Metrics, execution: Execution) -> None:
    """Count a job that has ended."""
    for seconds in execution.steps.start_seconds:
        metrics.unit_started(seconds)
    if execution.steps.intent in (Intent.CANCELLED, Intent.GONE):
        metrics.job_cancelled(graceful=not execution.killed)
        return
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
