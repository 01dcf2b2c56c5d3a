"""Orders from outside for running jobs and for the agent: the master's and the operator's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from worker.control import Status
from worker.dispatch import Dispatcher
from worker.errors import SystemdError
from worker.jobs.outcome import Intent
from worker.ledger import Ledger

logger = logging.getLogger(__name__)

ORDER_SEC = 30.0
_DRAINING = "draining"


class JobOrders:
    """What the master wants of jobs that run here (the callbacks of ``worker.watch``)."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._running = dispatcher.running

    async def cancelled(self, job_id: str) -> None:
        if execution := self._running.get(job_id):
            execution.stop(Intent.CANCELLED)

    async def gone(self, job_id: str, _why: str) -> None:
        if execution := self._running.get(job_id):
            execution.stop(Intent.GONE)

    async def paused(self, job_id: str) -> None:
        """A job that has no unit just now is paused at the next look."""
        if execution := self._running.get(job_id):
            await _soon(execution.steps.pause())

    async def resumed(self, job_id: str) -> None:
        if execution := self._running.get(job_id):
            await _soon(execution.steps.resume())

    def is_paused(self, job_id: str) -> bool:
        execution = self._running.get(job_id)
        return execution is not None and execution.steps.paused


async def _soon(order: Coroutine[None, None, None]) -> None:
    """Raises SystemdError also if systemd does not take the order for long: it is repeated."""
    try:
        async with asyncio.timeout(ORDER_SEC):
            await order
    except TimeoutError:
        raise SystemdError(f"systemd has not answered for {ORDER_SEC:g} s") from None


class Draining:
    """Whether the operator wants no jobs taken; outlives the agent, as maintenance may."""

    def __init__(self, dispatcher: Dispatcher, ledger: Ledger) -> None:
        """Raises LedgerError."""
        self._dispatcher = dispatcher
        self._ledger = ledger
        self.on = ledger.get(_DRAINING) == "yes"

    @property
    def commands(self) -> Mapping[str, Callable[[], Awaitable[Mapping[str, Any]]]]:
        """For the control socket."""
        return {
            "drain": self._drain,
            "undrain": self._undrain,
            "status": self._status,
            "wait": self._wait,
        }

    async def _drain(self) -> Mapping[str, Any]:
        return await self._set(True)

    async def _undrain(self) -> Mapping[str, Any]:
        return await self._set(False)

    async def _set(self, on: bool) -> Mapping[str, Any]:
        await self._ledger.run(self._ledger.put, _DRAINING, "yes" if on else "")
        if on != self.on:
            logger.info("draining: no more jobs are taken" if on else "jobs are taken again")
        self.on = on
        self._dispatcher.tell_change()
        self._dispatcher.nudge()
        return await self._status()

    async def _status(self) -> Mapping[str, Any]:
        return self._now().answer()

    async def _wait(self) -> Mapping[str, Any]:
        # A request for a job that is under way may still bring one.
        while self.on and (self._dispatcher.asking or not self._now().idle):
            await self._dispatcher.news.wait()
        return await self._status()

    def _now(self) -> Status:
        dispatcher = self._dispatcher
        return Status(self.on, tuple(dispatcher.running), len(dispatcher.reports))
