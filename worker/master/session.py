"""Being known to the master: registration, heartbeats, and work only while both hold.

A master forgets nodes and gives out new ids; it calls a node dead 90 s after it last heard of
it, and a node once dead stays ``offline`` whatever it sends, until it registers again. So
the id is never taken for granted, and a silence longer than that ends in a registration.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection
from typing import NoReturn

from worker.errors import (
    MasterError,
    MasterRefused,
    MasterUnreachable,
    NodeUnknown,
    Unauthorized,
)
from worker.master.answers import quotable
from worker.master.client import NO_SUCH_ROUTE, MasterClient
from worker.master.outages import in_our_words
from worker.master.retry import Backoff, Throttle, Uniform
from worker.master.wire import Job, NodeRegistration

logger = logging.getLogger(__name__)

DEAD_AFTER = 90.0
"""Seconds after the last heartbeat at which the master gives a node up."""

HANDED_OUT = frozenset({"processing", "assigned", "running"})
"""States of a job that its node is expected to be running."""

HEARTBEAT_PATIENCE = 60.0
"""Seconds. A heartbeat is put off no longer than this, whatever Retry-After says: a master that
does not hear of us for DEAD_AFTER runs our jobs a second time."""

MOST_TAKEN = 10_000
"""Acceptances that are remembered, so that none is taken for one never heard of."""

MOST_NODE_IDS = 20
"""Ids under which a master may have known us that are remembered; the last ones."""

LIST_PATIENCE = 60.0
"""Seconds between two looks at the master's list of jobs, where it cannot be had."""
COSTLY = 0.1
"""Seconds of CPU time for a look at the list; one that takes more is not repeated at once."""
CPU_SHARE = 0.02
"""Of one core, which such looks may cost at most."""


class NodeSession:
    """Our standing with one master.

    ``heartbeat_interval``
        In seconds.
    ``on_heartbeat``, ``on_answer``
        Called after each heartbeat that the master took, and with whether it answers, whenever
        that is learnt.
    ``in_doubt``
        The master may have handed us jobs that we do not know of, as after a restart.
    ``run_by_others``
        Whether another process on this machine runs a job (by id) as this node.
    ``node_ids``, ``on_registered``
        The ids under which the master knew this node before, and what is called with each one
        that it gives us, before anything is done under it.
    ``clock``, ``sleep``, ``uniform``
        Stand in for time and chance in tests.
    """

    def __init__(
        self,
        client: MasterClient,
        registration: NodeRegistration,
        *,
        heartbeat_interval: float = 30.0,
        on_heartbeat: Callable[[], None] | None = None,
        on_answer: Callable[[bool], None] | None = None,
        in_doubt: bool = False,
        run_by_others: Callable[[str], bool] | None = None,
        node_ids: Collection[str] = (),
        on_registered: Callable[[str], Awaitable[None]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        uniform: Uniform = random.uniform,
    ) -> None:
        self._client = client
        self._registration = registration
        self._interval = heartbeat_interval
        self._on_heartbeat = on_heartbeat
        self._on_answer = on_answer
        self._run_by_others = run_by_others or (lambda job_id: False)
        self._clock = clock
        self._sleep = sleep
        self._uniform = uniform
        self._registering = asyncio.Lock()
        self._complaint = Throttle(clock=clock)
        self._job_complaint = Throttle(clock=clock)
        self._complained = False
        self._taken: dict[bytes, None] = {}
        self._registrations = 0
        self._in_doubt = in_doubt
        self._list_due = 0.0
        self.node_id: str | None = None
        """The id that the master gave us last; it may have forgotten it, see ``registered``."""
        self._on_registered = on_registered
        self.node_ids: list[str] = [*node_ids][-MOST_NODE_IDS:]
        """The last ids it has given us: jobs may be held under an earlier one."""
        self.registered = False
        """Whether the master knows us, as far as its last answer tells."""
        self.last_heartbeat_at: float | None = None
        """When the master last heard of us and said so (registering counts), on ``clock``."""
        self.last_error = ""
        """What went wrong last, in none of the master's words; empty as soon as it answers well
        again."""

    async def register(self) -> str:
        """Our node id; registers first if need be, for as long as that takes."""
        if self.registered and self.node_id is not None:
            return self.node_id
        return await self._register_anew(self.node_id)

    async def run(self) -> NoReturn:
        """Register and keep sending heartbeats, until cancelled."""
        backoff = Backoff(1.0, max(1.0, self._interval / 3), uniform=self._uniform)
        slow = self._slow()
        await self.register()
        while True:
            try:
                await self._beat()
            except Unauthorized as error:
                wait = slow.next(error.retry_after)
                self._failed("heartbeat failed", error, self._complaint)
            except (MasterUnreachable, MasterRefused) as error:
                # Sooner than the interval: a few lost heartbeats in a row make us dead.
                wait = backoff.next(min(error.retry_after or 0.0, HEARTBEAT_PATIENCE))
                self._failed("heartbeat failed", error, self._complaint)
            else:
                # A little early at random, so that many nodes do not beat in step.
                wait = self._interval * self._uniform(0.9, 1.0)
                backoff.reset()
                slow.reset()
            await self._sleep(wait)

    async def next_job(self, held: Collection[str] | None = None) -> Job | None:
        """The next job for this node, None if there is none; registers where needed.

        ``held`` are the ids of all jobs that this node runs or still has to report. With it,
        a job is recovered that the master handed out in an answer that never arrived: nobody
        would run it otherwise, and our heartbeats would keep it from being given to others.

        Raises MasterUnreachable, Unauthorized or MasterRefused, for the caller to back off.
        """
        try:
            job = await self._next_job(held)
        except (MasterUnreachable, MasterRefused) as error:
            # A master that does not answer is one fact; that it gives no jobs is another.
            down = isinstance(error, MasterUnreachable)
            self._failed(
                "cannot ask for jobs", error, self._complaint if down else self._job_complaint
            )
            raise
        self._answered()
        self._job_complaint.relax()
        if job is not None:
            self.remember(job)
        return job

    def remember(self, job: Job) -> None:
        """This acceptance is known here: it is not to be recovered as one never heard of."""
        self._taken[_acceptance(job)] = None
        if len(self._taken) > MOST_TAKEN:
            del self._taken[next(iter(self._taken))]

    async def _next_job(self, held: Collection[str] | None) -> Job | None:
        node_id = await self.register()
        if self._in_doubt and held is not None:
            job = await self._lost_in_transit(held)
            if job is not None:
                return job
            node_id = await self.register()
        try:
            return await self._take(node_id)
        except MasterRefused as error:
            if not await self._forgotten(node_id, error):
                raise
        return await self._take(await self._register_anew(node_id))

    async def _take(self, node_id: str) -> Job | None:
        try:
            return await self._client.next_job(node_id)
        except MasterUnreachable as error:
            self._in_doubt |= error.sent
            raise
        except MasterRefused as error:
            self._in_doubt |= error.status >= 500 or error.status < 300
            raise

    async def _lost_in_transit(self, held: Collection[str]) -> Job | None:
        if self._clock() < self._list_due:
            return None
        begun = time.thread_time()
        try:
            jobs = await self._client.jobs(lambda job: self._never_heard_of(job, held), most=1)
        except Unauthorized:
            raise
        except MasterRefused as error:
            # A master that shows no jobs has none to recover, and may well have jobs to give.
            if error.status in NO_SUCH_ROUTE:
                self._in_doubt = False
            else:
                self._list_due = self._clock() + LIST_PATIENCE
                logger.warning("jobs lost on the way to us cannot be looked for: %s", error)
            return None
        if (cost := time.thread_time() - begun) > COSTLY:
            self._list_due = self._clock() + cost / CPU_SHARE
        for job in jobs:
            logger.warning(
                "job %s was handed to us in an answer that did not arrive; taken up now",
                quotable(job.id),
            )
            return job
        self._in_doubt = False
        return None

    def _never_heard_of(self, job: Job, held: Collection[str]) -> bool:
        """Whether the master takes the job for running here, and it is not."""
        if job.node_id not in self.node_ids or job.status not in HANDED_OUT or job.id in held:
            return False
        if _acceptance(job) in self._taken:
            return False  # it was run, and the master did not want its result
        return not self._run_by_others(job.id)

    async def _forgotten(self, node_id: str, error: MasterRefused) -> bool:
        """Whether the master refused a job because it does not know this node."""
        if isinstance(error, NodeUnknown):
            return True
        if error.status != 500:
            return False
        try:
            await self._client.heartbeat(node_id)
        except NodeUnknown:
            return True
        except MasterError:
            return False  # that says nothing about the node; the first error stands
        self._heard()
        return False

    async def _beat(self) -> None:
        """One heartbeat, or a registration where a heartbeat would not do."""
        node_id = await self.register()
        silence = self._clock() - (self.last_heartbeat_at or 0.0)
        if silence > DEAD_AFTER:
            logger.warning(
                "the master has not heard of us for %.0f s and may have given our jobs away; "
                "registering again", silence,
            )  # fmt: skip
            node_id = await self._register_anew(node_id)
        try:
            await self._client.heartbeat(node_id)
        except NodeUnknown as error:
            logger.warning("%s; registering again", error)
            node_id = await self._register_anew(node_id)
            await self._client.heartbeat(node_id)
        self._heard()

    async def _register_anew(self, lost: str | None) -> str:
        """A node id in place of the lost one; callers at the same time share a registration."""
        before = self._registrations
        async with self._registering:
            known = self.node_id if self.registered else None
            # Somebody registered while we waited for our turn (the id can stay the same), or
            # before we learned that the id of an older one is void.
            if known is not None and (self._registrations != before or known != lost):
                return known
            self.registered = False
            return await self._register_until_it_works()

    async def _register_until_it_works(self) -> str:
        backoff = Backoff(1.0, 30.0, uniform=self._uniform)
        slow = self._slow()
        while True:
            try:
                node = await self._client.register(self._registration)
            except Unauthorized as error:
                wait = slow.next(error.retry_after)
                self._failed("cannot register", error, self._complaint)
            except (MasterUnreachable, MasterRefused) as error:
                wait = backoff.next(error.retry_after)
                self._failed("cannot register", error, self._complaint)
            else:
                break
            await self._sleep(wait)
        self.node_id = node.id
        self.node_ids[:] = [*(name for name in self.node_ids if name != node.id), node.id]
        del self.node_ids[:-MOST_NODE_IDS]
        if self._on_registered is not None:
            await self._on_registered(node.id)
        self.registered = True
        self._registrations += 1
        self._answered()
        self.last_heartbeat_at = self._clock()
        logger.info(
            "registered with the master at %s as node %s (%s)",
            self._client.peer, quotable(node.id), quotable(node.name or self._registration.address),
        )  # fmt: skip
        return node.id

    def _heard(self) -> None:
        """The master took a heartbeat."""
        self._answered()
        self._complaint.reset()
        self.last_heartbeat_at = self._clock()
        if self._on_heartbeat is not None:
            self._on_heartbeat()

    def _answered(self) -> None:
        """The master did what it was asked."""
        if self._complained:
            logger.info("the master at %s answers again", self._client.peer)
        self._complained = False
        self.last_error = ""
        if self._on_answer is not None:
            self._on_answer(True)

    def _failed(self, what: str, error: MasterError, complaint: Throttle) -> None:
        """Say so at once, and then less and less often."""
        self.last_error = in_our_words(error, self._client.peer)
        if self._on_answer is not None:
            self._on_answer(False)
        level = logging.ERROR if isinstance(error, Unauthorized) else logging.WARNING
        due = complaint.due()
        self._complained |= due
        logger.log(level if due else logging.DEBUG, "%s: %s", what, error)

    def _slow(self) -> Backoff:
        """30 s rising to 5 min: asking again soon does not mend a key."""
        return Backoff(30.0, 270.0, floor=30.0, uniform=self._uniform)


def _acceptance(job: Job) -> bytes:
    """Names an acceptance in few bytes: ids can be long, and many are remembered."""
    return hashlib.sha256(f"{job.retry_count} {job.id}".encode()).digest()[:16]
