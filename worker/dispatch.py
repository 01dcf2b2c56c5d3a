"""Fills free slots with jobs and sees every result on its way.

A slot that frees polls at once, free slots fill in one burst, and only an empty answer waits
for the poll interval. A job is held from its acceptance until its report has arrived; what is
held is on record (worker.acceptance), each step before the next one acts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import Protocol

from worker.acceptance import Acceptance, Unrecorded
from worker.control import News
from worker.errors import LedgerError, MasterRefused, MasterUnreachable, Reason, Unauthorized
from worker.execution import Execution
from worker.jobs.outcome import Intent
from worker.jobs.report import bandwidth_mbps, verdict_of
from worker.jobs.spec import Queue
from worker.ledger import Entry, Ledger, State
from worker.master.delivery import Delivered, Dropped
from worker.master.retry import Backoff, Throttle
from worker.master.wire import Job, JobResult
from worker.telemetry.metrics import Metrics
from worker.telemetry.pulse import Pulse

logger = logging.getLogger(__name__)

LIVE_STALE_SEC = 300
"""The master takes a live job back when it has heard nothing of it for so long."""
BATCH_STALE_SEC = 1800
"""The master queues a default or batch job again when it has run for so long."""
LAST_POLL_SEC = 5.0
LAST_JOBS_SEC = 25.0
"""A job has 10 s between SIGTERM and SIGKILL; what takes longer is stuck, or systemd is away."""
LAST_REPORTS_SEC = 20.0
LEAVING_SEC = 5.0
REQUEST_SEC = 180.0
"""No request for a job, with all that belongs to it, takes longer."""
MOST_UNDELIVERED = 100
"""A node that cannot report takes no more jobs than this: they are lost time for all."""
MAX_RETRIES = 3
"""What masters do by default, for those that do not say it."""
LEFT_TO_THE_MASTER = "left to the master, which gives it away when this node is silent for 90 s"


class Source(Protocol):
    """Where jobs come from (``worker.master.session.NodeSession``)."""

    registered: bool

    async def next_job(self, held: Collection[str] | None = None) -> Job | None: ...


class Deliver(Protocol):
    """Returns when the result has arrived, or is not wanted any more."""

    def __call__(
        self, job: Job, result: JobResult, *, maybe_landed: bool
    ) -> Coroutine[None, None, Delivered | Dropped]: ...


@dataclass(slots=True)
class Held:
    """A job whose report is on its way."""

    acceptance: Acceptance
    result: JobResult
    execution: Execution | None
    settled: bool = False
    """The master has it, or does not want it."""

    @property
    def job(self) -> Job:
        return self.acceptance.job


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
        self._deliver = deliver
        self._ledger = ledger
        self._blocked = blocked
        self._metrics = metrics
        self._pulse = pulse or Pulse()
        self._acceptances: dict[str, Acceptance] = {}
        self._jobs: set[asyncio.Task[None]] = set()
        self._reports: dict[asyncio.Task[None], Held] = {}
        self._stuck: set[str] = set()
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
        return {*self.running, *(held.job.id for held in self._reports.values()), *self._stuck}

    @property
    def undelivered(self) -> int:
        """How many reports are on their way."""
        return len(self._reports)

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
            if reason := self._blocked() or self._too_many_undelivered():
                if self._complaint.due():
                    logger.warning("taking no jobs: %s", reason)
                await self._pause(self._poll_interval, slot=True)
                continue
            self.asking = True
            try:
                job = await source.next_job(self.held)
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

    def nudge(self) -> None:
        """What kept jobs from being taken is over, perhaps: look at once."""
        self._slot_freed.set()

    def _answer_came(self) -> None:
        self.asking = False
        self.tell_change()

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
            _, busy = await asyncio.wait(self._jobs, timeout=LEAVING_SEC)
            await _cancelled(busy)
        await _cancelled(self._reports)

    async def stop(self, intent: Intent, hurry: asyncio.Event) -> None:
        """End the jobs and see their reports off, for as long as a service may take to stop.

        ``hurry`` cuts the waiting for reports short. What is not off by then is on record.
        """
        self.stop_polling()
        for execution in self.running.values():
            execution.stop(intent)
        if self._jobs:
            _, stuck = await asyncio.wait(self._jobs, timeout=LAST_JOBS_SEC)
            if stuck:
                logger.error("jobs that could not be ended in time: %s", ", ".join(self.running))
                await _cancelled(stuck)
        reports = [*self._reports]
        if reports and not hurry.is_set():
            hurried = asyncio.create_task(hurry.wait())
            everything = asyncio.create_task(asyncio.wait(reports))
            await asyncio.wait(
                (hurried, everything), timeout=LAST_REPORTS_SEC, return_when="FIRST_COMPLETED"
            )
            hurried.cancel()
            everything.cancel()
        for held in self._reports.values():
            logger.error(
                "job %s: the master did not take its result in time; it is sent when the worker "
                "runs again", held.job.id,
            )  # fmt: skip
        await _cancelled(self._reports)

    # --- taking jobs

    async def _accept(self, job: Job) -> bool:
        """Put a job on record and start it; False if there was nothing to start."""
        if running := self.running.get(job.id):
            await self._go_on(running, job)
            return False
        try:
            for held in [held for held in self._reports.values() if held.job.id == job.id]:
                if await self._answered(held, job):
                    return True
            self._stuck.discard(job.id)
            # Without a count of its retries one acceptance cannot be told from the next.
            known = None
            if "retry_count" in job.model_fields_set:
                known = await self._ledger.run(self._ledger.find, job)
            if known is not None and (known.result is not None or known.steps):
                return self._repeat(known, job)
            if known is None or known.state is not State.ACCEPTED:
                known = await self._ledger.run(self._ledger.accept, job)
        except LedgerError as error:
            logger.error("job %s cannot be taken: %s", job.id, error)
            self.report(Unrecorded(job), failed(job, f"the worker cannot take jobs: {error}"))
            return False
        self.start(Acceptance(self._ledger, known))
        return True

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

    async def _answered(self, held: Held, job: Job) -> bool:
        """Whether the result that is still to be reported answers for the new acceptance, too."""
        report = next(task for task, other in self._reports.items() if other is held)
        await _cancelled([report])
        same = held.result.status == "completed" and held.job.created_at == job.created_at
        if same and not held.settled:
            logger.warning(
                "job %s was handed out again (retry %d), but is completed here; reporting that",
                job.id, job.retry_count,
            )  # fmt: skip
            await held.acceptance.reissue(job)
            self.report(held.acceptance, held.result, held.execution)
            return True
        # Whatever has become of that report is past.
        how = ("delivered", "") if held.settled else ("dropped", "the job was handed out anew")
        await self._put_away(held.acceptance, held.execution, *how)
        return False

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
        self.report(Unrecorded(job), result.model_copy(update={"node_id": job.node_id}))
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
            self.report(acceptance, defect(job, error))
            return
        self.running[job.id] = execution
        self._acceptances[job.id] = acceptance
        self._idle.clear()
        self.tell_change()
        task = asyncio.create_task(self._work(execution, acceptance), name=f"job {job.id}")
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
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
        clean = False
        try:
            result = await self._result(execution)
            if result is not None:
                clean = await acceptance.finish(result, execution.evidence())
                if clean:  # else the unit and the files are the only record of the job
                    await execution.release()
        finally:
            if stale is not None:
                stale.cancel()
            del self.running[execution.job.id]
            del self._acceptances[execution.job.id]
            self._repeated.discard(execution.job.id)
            self._slot_freed.set()
            self.tell_change()
            if not self.running:
                self._idle.set()
        if result is None:
            return
        count(self._metrics, execution)
        if why := _not_to_be_reported(execution, result):
            logger.warning("job %s: not reported: %s", execution.job.id, why)
            self.left_to_the_master |= why == LEFT_TO_THE_MASTER
            await self._put_away(acceptance, execution, "dropped", why)
        else:
            self.report(acceptance, result, execution)

    async def _result(self, execution: Execution) -> JobResult | None:
        try:
            return await execution.run()
        except Exception as error:
            logger.exception("job %s: internal error", execution.job.id)
            return defect(execution.job, error)

    # --- seeing results off

    def report(
        self,
        acceptance: Acceptance,
        result: JobResult,
        execution: Execution | None = None,
        *,
        maybe_landed: bool = False,
    ) -> None:
        """See a result off, and then put away what is left of the job."""
        held = Held(acceptance, result, execution)
        report = asyncio.create_task(
            self._see_off(held, maybe_landed), name=f"report of {held.job.id}"
        )
        self._reports[report] = held
        report.add_done_callback(self._reported)
        self._metrics.set_undelivered(len(self._reports))

    async def _see_off(self, held: Held, maybe_landed: bool) -> None:
        await self._finished(held)
        outcome = await self._deliver(held.job, held.result, maybe_landed=maybe_landed)
        held.settled = True
        await self._finished(held)
        how = ("dropped", outcome.why) if isinstance(outcome, Dropped) else ("delivered", "")
        await self._put_away(held.acceptance, held.execution, *how)

    async def _finished(self, held: Held) -> None:
        """Put the result on record, if that has not been possible until now."""
        if not held.acceptance.finished:
            evidence = held.execution.evidence() if held.execution else {}
            await held.acceptance.finish(held.result, evidence)

    async def _put_away(
        self, acceptance: Acceptance, execution: Execution | None, how: str, why: str
    ) -> None:
        """Nothing is owed for the job any more: nothing of it is to stay."""
        if acceptance.finished:
            await acceptance.settle(how, why)
        if execution is not None:
            await execution.release()
            execution.close()
        if acceptance.finished:
            await acceptance.reap()

    def _reported(self, report: asyncio.Task[None]) -> None:
        held = self._reports.pop(report)
        self._metrics.set_undelivered(len(self._reports))
        self.tell_change()
        if not report.cancelled() and (error := report.exception()):
            # A defect of ours. The job stays ours, or it would be taken for one never heard of.
            logger.error("job %s: reporting it failed", held.job.id, exc_info=error)
            self._stuck.add(held.job.id)

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


async def _cancelled(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait for their end."""
    for task in (tasks := [*tasks]):
        task.cancel()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            await asyncio.gather(*tasks, return_exceptions=True)


def defect(job: Job, error: Exception) -> JobResult:
    """The result of a job that an error of ours has ended."""
    return failed(job, f"internal error: {type(error).__name__}")


def failed(job: Job, sentence: str) -> JobResult:
    """The result of a job that this node could not even begin, or had to give up."""
    return JobResult(
        job_id=job.id,
        node_id=job.node_id,
        status="failed",
        metrics={"failure_reason": Reason.PLATFORM_ERROR.value},
        error=f"{Reason.PLATFORM_ERROR}: {sentence}",
    )


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
