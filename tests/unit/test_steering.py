"""Orders from outside: the master's for running jobs, the operator's for the agent."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from worker.control import News
from worker.dispatch import Dispatcher
from worker.errors import SystemdError
from worker.jobs.outcome import Intent
from worker.ledger import Ledger
from worker.steering import Draining, JobOrders


class FakeSteps:
    paused = False

    async def pause(self) -> None:
        self.paused = True

    async def resume(self) -> None:
        self.paused = False


class FakeDispatcher:
    def __init__(self) -> None:
        self.running: dict[str, Any] = {}
        self.reports: list[str] = []
        self.asking = False
        self.news = News()
        self.nudged = 0

    def tell_change(self) -> None:
        self.news.tell()

    def nudge(self) -> None:
        self.nudged += 1


async def test_what_the_master_wants_of_a_job() -> None:
    stopped: list[Intent] = []
    dispatcher = FakeDispatcher()
    dispatcher.running["a"] = SimpleNamespace(stop=stopped.append, steps=FakeSteps())
    orders = JobOrders(cast("Dispatcher", dispatcher))
    assert not orders.is_paused("a")
    await orders.paused("a")
    assert orders.is_paused("a")
    await orders.resumed("a")
    assert not orders.is_paused("a")
    await orders.cancelled("a")
    await orders.gone("a", "it is with another")
    assert stopped == [Intent.CANCELLED, Intent.GONE]
    for order in (orders.paused, orders.resumed, orders.cancelled):
        await order("ended meanwhile")
    assert not orders.is_paused("ended meanwhile")


async def test_an_order_that_systemd_does_not_take_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stuck(FakeSteps):
        async def pause(self) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr("worker.steering.ORDER_SEC", 0.01)
    dispatcher = FakeDispatcher()
    dispatcher.running["a"] = SimpleNamespace(steps=Stuck())
    with pytest.raises(SystemdError, match="has not answered"):
        await JobOrders(cast("Dispatcher", dispatcher)).paused("a")


async def test_draining_lasts_until_it_is_undone(ledger: Ledger) -> None:
    dispatcher = FakeDispatcher()
    dispatcher.running["a"] = None
    draining = Draining(cast("Dispatcher", dispatcher), ledger)
    assert not draining.on
    answer = await draining.commands["drain"]()
    assert answer == {"draining": True, "running": ["a"], "undelivered": 0}
    assert draining.on
    assert Draining(cast("Dispatcher", dispatcher), ledger).on, "also after a restart"
    assert (await draining.commands["undrain"]())["draining"] is False
    assert dispatcher.nudged == 2
    assert not Draining(cast("Dispatcher", dispatcher), ledger).on


async def test_waiting_ends_when_nothing_runs_is_owed_or_may_come(ledger: Ledger) -> None:
    dispatcher = FakeDispatcher()
    dispatcher.running["a"] = None
    dispatcher.asking = True
    draining = Draining(cast("Dispatcher", dispatcher), ledger)
    await draining.commands["drain"]()
    waiting = asyncio.ensure_future(draining.commands["wait"]())

    async def goes_on() -> bool:
        dispatcher.tell_change()
        for _ in range(5):
            await asyncio.sleep(0)
        return not waiting.done()

    dispatcher.reports.append("b")
    assert await goes_on()
    del dispatcher.running["a"]
    assert await goes_on()
    dispatcher.reports.clear()
    assert await goes_on()
    dispatcher.asking = False
    assert not await goes_on()
    assert (await waiting)["draining"] is True


async def test_undraining_ends_the_waiting(ledger: Ledger) -> None:
    dispatcher = FakeDispatcher()
    dispatcher.running["a"] = None
    draining = Draining(cast("Dispatcher", dispatcher), ledger)
    await draining.commands["drain"]()
    waiting = asyncio.ensure_future(draining.commands["wait"]())
    await asyncio.sleep(0)
    await draining.commands["undrain"]()
    async with asyncio.timeout(5):
        assert (await waiting)["draining"] is False
