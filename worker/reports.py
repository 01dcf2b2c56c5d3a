"""Results on their way to the master, and what is put away when they have arrived."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import Protocol

from worker.acceptance import Acceptance
from worker.errors import Reason
from worker.execution import Execution
from worker.ledger import reading
from worker.master.delivery import Delivered, Dropped
from worker.master.wire import Job, JobResult

logger = logging.getLogger(__name__)

LAST_REPORTS_SEC = 20.0
MOST_UNDELIVERED = 100
"""A node that cannot report takes no more jobs than this: they are lost time for all."""


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

    async def finished(self) -> None:
        """Put the result on record, if that has not been possible until now."""
        if not self.acceptance.finished:
            evidence = self.execution.evidence() if self.execution else {}
            await self.acceptance.finish(self.result, evidence)


class Reports:
    """``told`` is called with their number whenever it changes."""

    def __init__(self, deliver: Deliver, told: Callable[[int], None]) -> None:
        self._deliver = deliver
        self._told = told
        self._tasks: dict[asyncio.Task[None], Held] = {}
        self._stuck: set[str] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def jobs(self) -> set[str]:
        """Ids of the jobs that are still to be reported."""
        return {*(held.job.id for held in self._tasks.values()), *self._stuck}

    @property
    def too_many(self) -> str:
        """Why no more jobs are to be taken; empty if they may be."""
        count = len(self._tasks)
        return f"{count} results are not delivered yet" if count >= MOST_UNDELIVERED else ""

    def add(
        self,
        acceptance: Acceptance,
        result: JobResult,
        execution: Execution | None = None,
        *,
        maybe_landed: bool = False,
    ) -> None:
        """See a result off, and then put away what is left of the job."""
        held = Held(acceptance, result, execution)
        task = asyncio.create_task(
            self._see_off(held, maybe_landed), name=f"report of {held.job.id}"
        )
        self._tasks[task] = held
        task.add_done_callback(self._ended)
        self._told(len(self._tasks))

    async def answer(self, job: Job) -> bool:
        """Whether the result that is still to be reported answers for a new acceptance, too.

        Any other report of the job is past. Raises LedgerError.
        """
        self._stuck.discard(job.id)
        for task, held in [*self._tasks.items()]:
            if held.job.id != job.id:
                continue
            again = job.counts_retries and reading.key(job) == reading.key(held.job)
            if again and job.node_id == held.job.node_id and not held.settled:
                return True  # its report is on its way, and would never arrive if begun anew
            await cancelled([task])
            same = held.result.status == "completed" and held.job.created_at == job.created_at
            if same and not held.settled:
                logger.warning(
                    "job %s was handed out again (retry %d), but is completed here; reporting that",
                    job.id, job.retry_count,
                )  # fmt: skip
                await held.acceptance.reissue(job)
                self.add(held.acceptance, held.result, held.execution)
                return True
            how = ("delivered", "") if held.settled else ("dropped", "the job was handed out anew")
            await self.put_away(held.acceptance, held.execution, *how)
        return False

    async def finish(self, hurry: asyncio.Event) -> None:
        """Wait for the last ones, not for ever and not after ``hurry``."""
        if self._tasks and not hurry.is_set():
            hurried = asyncio.create_task(hurry.wait())
            everything = asyncio.create_task(asyncio.wait([*self._tasks]))
            await asyncio.wait(
                (hurried, everything), timeout=LAST_REPORTS_SEC, return_when="FIRST_COMPLETED"
            )
            hurried.cancel()
            everything.cancel()
        for held in self._tasks.values():
            logger.error(
                "job %s: the master did not take its result in time; it is sent when the worker "
                "runs again", held.job.id,
            )  # fmt: skip
        await self.leave()

    async def leave(self) -> None:
        """Let go of all of them: they are on record."""
        await cancelled(self._tasks)

    async def put_away(
        self, acceptance: Acceptance, execution: Execution | None, how: str, why: str
    ) -> None:
        """Nothing is owed for the job any more: nothing of it is to stay."""
        if execution is not None:
            await execution.release()
            execution.close()
        if acceptance.finished:
            await acceptance.close(how, why)

    async def _see_off(self, held: Held, maybe_landed: bool) -> None:
        await held.finished()
        outcome = await self._deliver(held.job, held.result, maybe_landed=maybe_landed)
        held.settled = True
        await held.finished()
        how = ("dropped", outcome.why) if isinstance(outcome, Dropped) else ("delivered", "")
        await self.put_away(held.acceptance, held.execution, *how)

    def _ended(self, task: asyncio.Task[None]) -> None:
        held = self._tasks.pop(task)
        if not task.cancelled() and (error := task.exception()):
            # A defect of ours. The job stays ours, or it would be taken for one never heard of.
            logger.error("job %s: reporting it failed", held.job.id, exc_info=error)
            self._stuck.add(held.job.id)
        self._told(len(self._tasks))


async def cancelled(tasks: Collection[asyncio.Task[None]]) -> None:
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
