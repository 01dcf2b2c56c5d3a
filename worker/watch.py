"""Asks the master about each running job, for nobody tells a worker that one was cancelled.

A job is asked for about every ``interval`` seconds, first one interval after it was seen
first. The looks are spread over that time, one after the other, and there are at most
MOST_LOOKS of them in a second: with more jobs than that allows the interval grows, so that
100 jobs are each asked for every 25 s, at the cost of less than 1 % of a core.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from worker.errors import (
    JobUnknown,
    MasterRefused,
    MasterUnreachable,
    SystemdError,
    Unauthorized,
)
from worker.master.answers import quotable
from worker.master.client import NO_SUCH_ROUTE
from worker.master.retry import Backoff, Throttle
from worker.master.standing import Standing, standing, whereabouts
from worker.master.wire import Job

logger = logging.getLogger(__name__)

MOST_LOOKS = 4.0
"""A second, however many jobs run."""
IDLE_SECONDS = 1.0
"""The longest time in which a job that has just begun is not seen."""
RARELY = 60.0
"""Seconds between two looks that most likely teach nothing: at a job that the master does not
know, and at any job of a master that shows none."""
CPU_SHARE = 0.02
"""Of one core, which looks may cost at most. A master that numbers no jobs shows one only in
the list of all, and reading that can take a second."""


class Client(Protocol):
    """The part of ``worker.master.client.MasterClient`` that is used here."""

    async def job(self, job: Job) -> Job: ...


Told = Callable[[str], Awaitable[None]]
"""Gets the id of a job. May raise SystemdError: it is called again after the next look."""


@dataclass(slots=True)
class Followed:
    """A running job, as far as the watch knows it."""

    due: float
    """When it is to be asked for, on the clock."""
    told: tuple[Standing, int] | None = None
    """What was said and done last, and the retry count it was about; None: all is well."""
    unknown: bool = False
    """It was said that the master does not know the job."""
    complaint: Throttle = field(default_factory=Throttle)


class Watch:
    """Follows what becomes of our running jobs at the master.

    ``running``
        All jobs that run here, by id, each as it was accepted last.
    ``interval``
        In seconds.
    ``node_ids``
        All ids that the master has given us. Nothing is asked as long as there is none: before
        we are registered nobody can tell which jobs are with us.
    ``is_paused``
        Whether the job (by id) is held here. It must be true from the return of ``on_paused``
        on and false from that of ``on_resumed`` on; the watch has no memory of its own for it.
    ``on_cancelled``, ``on_gone``
        The job is to be stopped, and nothing to be reported. Called once when that is learnt,
        so it must be kept in mind if the job cannot be stopped just now. ``on_gone`` gets why
        as well, as a clause (``it is with node X at the master``).
    ``on_paused``, ``on_resumed``
        The job is to be held, or to go on.
    ``busy``
        Returns when a job runs; may return sooner. Without it that is looked for each second.
    ``clock``, ``cpu_clock``, ``sleep``, ``backoff``, ``slow``
        Stand in for time and chance in tests. ``cpu_clock`` is the CPU time of this thread.
    """

    def __init__(
        self,
        client: Client,
        running: Callable[[], Mapping[str, Job]],
        *,
        interval: float,
        node_ids: Callable[[], Collection[str]],
        is_paused: Callable[[str], bool],
        on_cancelled: Told,
        on_gone: Callable[[str, str], Awaitable[None]],
        on_paused: Told,
        on_resumed: Told,
        busy: Callable[[], Awaitable[None]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        backoff: Backoff | None = None,
        slow: Backoff | None = None,
    ) -> None:
        self._client = client
        self._running = running
        self._interval = interval
        self._node_ids = node_ids
        self._is_paused = is_paused
        self._on_cancelled = on_cancelled
        self._on_gone = on_gone
        self._on_paused = on_paused
        self._on_resumed = on_resumed
        self._busy = busy
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._sleep = sleep
        self._backoff = backoff or Backoff(1.0, 60.0)
        self._slow = slow or Backoff(30.0, 270.0, floor=30.0)
        self._followed: dict[str, Followed] = {}
        self._quiet_until = clock()
        self._blind = False
        self._complaint = Throttle(clock=clock)

    async def run(self) -> NoReturn:
        """Watch until cancelled."""
        while True:
            if self._busy is not None and not self._running():
                self._followed.clear()
                await self._busy()
            await self._sleep(await self._look())

    async def _look(self) -> float:
        """Ask for the job whose turn it is, if one's is; seconds until there is more to do."""
        running = self._running()
        self._follow(running)
        if not running or not self._node_ids():
            return IDLE_SECONDS
        name, followed = min(self._followed.items(), key=lambda item: item[1].due)
        now = self._clock()
        due = max(followed.due, self._quiet_until)
        if due > now:
            return min(due - now, IDLE_SECONDS)
        followed.due = now + self._interval
        begun = self._cpu_clock()
        wait = await self._ask(name, running[name], followed)
        thrifty = min((self._cpu_clock() - begun) / CPU_SHARE, RARELY)
        # Twice as often as would do: jobs that began together are then asked for one by one,
        # and the last of them is not late by a whole interval.
        spread = self._interval / (2 * len(running))
        self._quiet_until = self._clock() + max(wait, thrifty, spread)
        return 1.0 / MOST_LOOKS

    def _follow(self, running: Mapping[str, Job]) -> None:
        for name in self._followed.keys() - running.keys():
            del self._followed[name]
        due = self._clock() + self._interval
        for name in running:
            if name not in self._followed:
                self._followed[name] = Followed(due, complaint=Throttle(clock=self._clock))

    async def _ask(self, name: str, mine: Job, followed: Followed) -> float:
        """Look at one job and do what follows from it; seconds that the master is owed."""
        try:
            there = await self._client.job(mine)
        except JobUnknown as error:
            followed.due = self._clock() + RARELY
            if not followed.unknown:
                logger.warning("job %s: it goes on, although %s", quotable(name), error)
            followed.unknown = True
        except Unauthorized as error:
            return self._slow.next(error.retry_after)
        except MasterUnreachable as error:
            return self._backoff.next(error.retry_after)  # the session says so
        except MasterRefused as error:
            return self._refused(error)
        except Exception:
            # A defect of ours. The jobs do not depend on being watched.
            logger.log(
                logging.ERROR if followed.complaint.due() else logging.DEBUG,
                "job %s: internal error while asking for it", quotable(name), exc_info=True,
            )  # fmt: skip
            return self._backoff.next()
        else:
            self._blind = False
            followed.unknown = False
            await self._learn(name, mine, there, followed)
        self._backoff.reset()
        self._slow.reset()
        return 0.0

    def _refused(self, error: MasterRefused) -> float:
        if error.status not in NO_SUCH_ROUTE:
            level = logging.WARNING if self._complaint.due() else logging.DEBUG
            logger.log(level, "what became of a job here is not known: %s", error)
            return self._backoff.next(error.retry_after)
        if not self._blind:
            logger.warning(
                "this master shows no jobs, so one that is cancelled or paused there goes on "
                "here: %s", error,
            )  # fmt: skip
        self._blind = True
        return max(RARELY, error.retry_after or 0.0)

    async def _learn(self, name: str, mine: Job, there: Job, followed: Followed) -> None:
        """The master has our job ``mine`` as ``there``."""
        if self._running().get(name) is not mine:
            return  # it ended or was handed out again meanwhile: this is about the past
        found = standing(there, mine, self._node_ids())
        if found in (Standing.OURS, Standing.PAUSED):
            followed.told = None
        elif followed.told == (found, mine.retry_count):
            return
        try:
            await self._act(name, there, found)
        except Exception as error:
            refused = isinstance(error, SystemdError)  # and not a defect of ours
            level = logging.WARNING if refused else logging.ERROR
            logger.log(
                level if followed.complaint.due() else logging.DEBUG,
                "job %s: what the master wants is not done yet: %s", quotable(name), error,
                exc_info=not refused,
            )  # fmt: skip
            return
        if found not in (Standing.OURS, Standing.PAUSED):
            followed.told = (found, mine.retry_count)

    async def _act(self, name: str, there: Job, found: Standing) -> None:
        where = f"it is {whereabouts(there, found)} at the master"
        shown = quotable(name)
        match found:
            case Standing.OURS:
                if self._is_paused(name):
                    await self._on_resumed(name)
                    logger.info("job %s: %s and goes on", shown, where)
            case Standing.PAUSED:
                if not self._is_paused(name):
                    await self._on_paused(name)
                    logger.info("job %s: %s and held here", shown, where)
            case Standing.CANCELED:
                await self._on_cancelled(name)
                logger.info("job %s: %s and stopped here", shown, where)
            case Standing.PENDING:
                logger.warning(
                    "job %s: %s (retry %d); it goes on here, and is expected back",
                    shown, where, there.retry_count,
                )  # fmt: skip
            case Standing.ENDED | Standing.ELSEWHERE | Standing.ANOTHER:
                await self._on_gone(name, where)
                logger.warning("job %s: %s; stopped here", shown, where)
