"""A watch, the jobs it watches, and a master that is a table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from worker.master.retry import Backoff
from worker.master.wire import Job
from worker.watch import Watch

MADE = "2026-11-24T19:00:00.5Z"


class Enough(Exception):
    """The time of the test is over."""


class Stage:
    """A master that is a table, jobs that run, and time that passes only in sleep."""

    def __init__(
        self,
        *names: str,
        interval: float = 5.0,
        client: Any = None,
        busy: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.now = 0.0
        self.cpu = 0.0
        self.cpu_of_a_look = 0.0
        self.running: dict[str, Job] = {name: job(name) for name in names}
        self.there: dict[str, Job | Exception] = dict(self.running)
        self.meanwhile: Callable[[], None] = lambda: None
        """What happens while a look is on its way."""
        self.asked: list[tuple[float, str]] = []
        self.done: list[tuple[str, ...]] = []
        self.paused: set[str] = set()
        self.trouble: Exception | None = None
        self.node_ids = {"us"}
        self.until = 0.0
        self.later: list[tuple[float, Callable[[], None]]] = []
        """What happens at a given time."""
        self.watch = Watch(
            client or self,
            lambda: self.running,
            interval=interval,
            node_ids=lambda: self.node_ids,
            is_paused=lambda name: name in self.paused,
            on_cancelled=self.cancelled,
            on_gone=self.gone,
            on_paused=self.hold,
            on_resumed=self.resume,
            busy=busy,
            clock=lambda: self.now,
            cpu_clock=lambda: self.cpu,
            sleep=self.sleep,
            backoff=Backoff(1.0, 60.0, uniform=lambda low, high: high),
            slow=Backoff(30.0, 270.0, floor=30.0, uniform=lambda low, high: high),
        )

    async def job(self, job: Job) -> Job:
        self.asked.append((self.now, job.id))
        self.cpu += self.cpu_of_a_look
        self.meanwhile()
        answer = self.there[job.id]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0
        if self.now + seconds > self.until:
            raise Enough
        self.now += seconds
        while self.later and self.later[0][0] <= self.now:
            self.later.pop(0)[1]()

    async def wait(self, seconds: float) -> None:
        """Let the watch work for so long."""
        self.until = self.now + seconds
        with pytest.raises(Enough):
            await self.watch.run()
        self.now = self.until

    def set(self, name: str = "a", **fields: Any) -> None:
        self.there[name] = self.running[name].model_copy(update=fields)

    def _note(self, *what: str) -> None:
        self.done.append(what)
        if self.trouble is not None:
            raise self.trouble

    def begin(self, name: str) -> None:
        self.running[name] = self.there[name] = job(name)

    async def cancelled(self, name: str) -> None:
        self._note("cancelled", name)

    async def gone(self, name: str, why: str) -> None:
        self._note("gone", name, why)

    async def hold(self, name: str) -> None:
        self._note("paused", name)
        self.paused.add(name)

    async def resume(self, name: str) -> None:
        self._note("resumed", name)
        self.paused.discard(name)


def job(name: str, **fields: Any) -> Job:
    given = {"id": name, "status": "processing", "node_id": "us", "created_at": MADE, **fields}
    return Job.model_validate(given)
