"""One result on its way to the master, who must hear it once and in time.

The master checks nothing: a report for a job that was cancelled meanwhile, or given to
another node, overwrites what is true there. And it counts: each ``failed`` that arrives puts
the job back into the queue and uses up one of its retries, so a second copy of the same
report costs a run, even of a job that was completed since.

So every post is preceded by a look at the job, and a report that may have arrived already
(the answer was lost, or an error) is judged by what became of the job: if it moved on as the
report would have moved it, the report has arrived.

A report can be days old, and the master may have been restored from a backup meanwhile. Then
what it has is what counts. A job that it takes for running here is reported, in an earlier
retry too. And a job that was made at another time is another job, whatever its id.

A job that waits there to be run again, as after an outage, would take our ``completed``; but it
may be given out between the look and the post, and the report would then free that node while
it works. So such a report is kept for a while: this node may be given the job, and what is
completed then answers for that, too (``worker.reports``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from worker.errors import (
    JobUnknown,
    MasterError,
    MasterRefused,
    MasterUnreachable,
    Unauthorized,
)
from worker.master.answers import quotable
from worker.master.client import NO_SUCH_ROUTE, MasterClient
from worker.master.retry import Backoff, Throttle
from worker.master.standing import Standing, standing, whereabouts
from worker.master.wire import Job, JobResult, ResultAnswer

logger = logging.getLogger(__name__)

_LOOKS = 5
"""A look-up that the master refuses so often does not work there, and reporting may."""
_UNKNOWN_LOOKS = 8
"""A master that does not know a job is asked so often, over a good quarter of an hour."""
_WAITING_LOOKS = 60
"""What is completed here and waits there is looked at so often, over about half an hour."""
_NOT_UNDERSTOOD = frozenset({400, 422})
_NOT_WANTED = frozenset({409, 410})
_BUSY = frozenset({429, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Delivered:
    """The master has the report. ``answer`` is None if its arrival was inferred."""

    answer: ResultAnswer | None


@dataclass(frozen=True, slots=True)
class Dropped:
    """The report is not to be sent (again). ``why`` is a sentence's end, for people."""

    why: str


@dataclass(frozen=True, slots=True)
class TryAgain:
    """Not delivered yet. ``after`` is in seconds, ``error`` is what stood in the way."""

    after: float
    error: MasterError | str


class Delivery:
    """The attempts to deliver one result.

    ``job``
        The job as it was accepted: its node id and retry count tell whose turn this was.
    ``maybe_landed``
        An earlier attempt may have arrived. Whoever stores undelivered reports must store
        this too, as true from the moment before an attempt: it may be cut short anywhere.
    ``node_ids``
        All ids that the master has given us: it may move our jobs along to a new one.
    """

    def __init__(
        self,
        client: MasterClient,
        job: Job,
        result: JobResult,
        *,
        maybe_landed: bool = False,
        node_ids: Collection[str] = (),
        backoff: Backoff | None = None,
        slow: Backoff | None = None,
    ) -> None:
        self._node_ids = node_ids
        self._refused_looks = 0
        self._unknown = 0
        self._waiting = 0
        self._client = client
        self._job = job
        self._result = result
        self._owner = job.node_id or result.node_id
        self._backoff = backoff or Backoff(1.0, 60.0)
        self._slow = slow or Backoff(30.0, 270.0, floor=30.0)
        self.maybe_landed = maybe_landed

    async def attempt(self) -> Delivered | Dropped | TryAgain:
        """Look the job up and, if it is still ours, report. Raises nothing of MasterError."""
        try:
            seen = await self._look()
            return seen if seen is not None else await self._post()
        except JobUnknown as error:
            # It may be the wrong master, or one whose data are being put back.
            self._unknown += 1
            if self._unknown < _UNKNOWN_LOOKS:
                return TryAgain(self._slow.next(), error)
            return self._dropped(f"the master does not know the job ({error})", logging.WARNING)
        except Unauthorized as error:
            return TryAgain(self._slow.next(error.retry_after), error)
        except (MasterRefused, MasterUnreachable) as error:
            return TryAgain(self._backoff.next(error.retry_after), error)

    async def _look(self) -> Delivered | Dropped | TryAgain | None:
        """What the job's state there says about this report; None: it is to be posted."""
        try:
            there = await self._client.job(self._job)
        except (JobUnknown, Unauthorized):
            raise
        except MasterRefused as error:
            self._refused_looks += error.status not in _BUSY
            if error.status not in NO_SUCH_ROUTE and self._refused_looks <= _LOOKS:
                raise
            return self._blind()
        found = standing(there, self._job, {*self._node_ids, self._owner})
        if found not in (Standing.OURS, Standing.PAUSED):
            moved = whereabouts(there, found)
            may_return = found is Standing.PENDING
        elif there.retry_count > self._job.retry_count:
            moved = f"in retry {there.retry_count}, and this was {self._job.retry_count}"
            may_return = True
        else:
            return None
        if self.maybe_landed and self._explains(there, found):
            logger.info("job %s: the report had arrived: it is %s", self._name, moved)
            return Delivered(None)
        if may_return and self._result.status == "completed":
            self._waiting += 1
            if self._waiting < _WAITING_LOOKS:
                why = f"it is {moved}; kept, should this node be given it again"
                return TryAgain(self._backoff.next(), why)
        return self._dropped(f"the job is no longer ours: it is {moved}", logging.WARNING)

    def _explains(self, there: Job, found: Standing) -> bool:
        """Whether the arrival of this report explains how the job moved on."""
        if found in (Standing.CANCELED, Standing.ANOTHER):
            return False
        if self._result.status == "failed":
            # In an earlier retry than ours the master cannot have heard of it.
            return there.status != "completed" and there.retry_count >= self._job.retry_count
        return there.status == self._result.status

    def _blind(self) -> Dropped | None:
        """This master has no way to look a job up."""
        if self.maybe_landed and self._result.status != "completed":
            return self._dropped(
                "it may have arrived, a second one could run the job again, and this master "
                "cannot be asked",
                logging.ERROR,
            )
        return None

    async def _post(self) -> Delivered | Dropped:
        """Send the report. Errors that leave hope are raised."""
        before = self.maybe_landed
        self.maybe_landed = True  # also if this task is cancelled while it waits
        try:
            answer = await self._client.post_result(self._result)
        except MasterUnreachable as error:
            self.maybe_landed = before or error.sent
            raise
        except MasterRefused as error:
            # An error in between may have come after the change was made, and a success that
            # nobody can read has most likely made it.
            self.maybe_landed = before or error.status >= 500 or error.status < 300
            if error.status == 413 and self._result.logs is not None:
                logger.warning("job %s: report too long, sent again without log", self._name)
                self._result = self._result.model_copy(update={"logs": None})
                return await self._post()
            if error.status in _NOT_UNDERSTOOD or error.status == 413:
                return self._dropped(f"the master does not accept it: {error}", logging.ERROR)
            if error.status in _NOT_WANTED:
                return self._dropped(f"the master does not want it: {error}", logging.WARNING)
            raise
        if answer.status == "retrying":
            logger.info(
                "job %s: reported %s; the master queues it again (retry %s of %s)",
                self._name, self._result.status, answer.retry, answer.max_retries,
            )  # fmt: skip
        else:
            logger.info("job %s: reported %s", self._name, self._result.status)
        return Delivered(answer)

    def _dropped(self, why: str, level: int) -> Dropped:
        logger.log(
            level, "job %s: report (%s) dropped: %s", self._name, self._result.status, why
        )  # fmt: skip
        return Dropped(why)

    @property
    def _name(self) -> str:
        return quotable(self._job.id)


async def deliver(
    client: MasterClient,
    job: Job,
    result: JobResult,
    *,
    maybe_landed: bool = False,
    node_ids: Collection[str] = (),
    backoff: Backoff | None = None,
    slow: Backoff | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Delivered | Dropped:
    """Keep attempting until the report has arrived or has become pointless.

    That may take for ever; the caller cancels when it must. ``backoff`` is for a master that
    does not answer or fails, ``slow`` for one that refuses the API key.
    """
    delivery = Delivery(
        client,
        job,
        result,
        maybe_landed=maybe_landed,
        node_ids=node_ids,
        backoff=backoff,
        slow=slow,
    )
    complaint = Throttle(clock=clock)
    while True:
        outcome = await delivery.attempt()
        if not isinstance(outcome, TryAgain):
            return outcome
        logger.log(
            logging.WARNING if complaint.due() else logging.DEBUG,
            "job %s: report (%s) not delivered, next attempt in %.0f s: %s",
            quotable(job.id), result.status, outcome.after, outcome.error,
        )  # fmt: skip
        await sleep(outcome.after)
