"""Why and how the agent stops: what becomes of its jobs and reports."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import cast

import pytest

from worker.config import Settings
from worker.dispatch import Dispatcher
from worker.ending import Ending, end_silence, silence_left
from worker.jobs.outcome import Intent
from worker.ledger import Ledger
from worker.systemd.bus import Bus
from worker.systemd.ownunit import StopReason
from worker.telemetry.notify import Notifier


class FakeDispatcher:
    def __init__(self) -> None:
        self.running = {"a": None}
        self.left_to_the_master = False
        self.done: list[str] = []
        self.ended = asyncio.Event()

    async def idle(self) -> None:
        self.done.append("waited")
        await self.ended.wait()

    async def leave(self) -> None:
        self.done.append("left")

    async def stop(self, intent: Intent, hurry: asyncio.Event) -> None:
        self.done.append(f"stopped: {intent}{', hurried' if hurry.is_set() else ''}")


@pytest.mark.parametrize(
    ("reason", "mode", "done"),
    [
        (StopReason.RESTART, "handback", ["left"]),
        (StopReason.RESTART, "drain", ["left"]),
        (StopReason.STOP, "leave", ["left"]),
        (StopReason.SIGNAL, "leave", ["left"]),
        (StopReason.STOP, "handback", ["waited", "stopped: shutdown"]),
        (StopReason.SIGNAL, "handback", ["waited", "stopped: shutdown"]),
        (StopReason.SHUTDOWN, "handback", ["stopped: poweroff"]),
        (StopReason.SHUTDOWN, "drain", ["stopped: poweroff"]),
        (StopReason.SHUTDOWN, "leave", ["stopped: poweroff"]),
        (None, "handback", ["left"]),
    ],
)
async def test_what_becomes_of_the_jobs(
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    reason: StopReason | None,
    mode: str,
    done: list[str],
) -> None:
    dispatcher, told = await ended(ledger, monkeypatch, reason, mode, grace=0.01)
    assert dispatcher.done == done
    assert told == [f"stopping ({(reason or StopReason.RESTART).value})"]


async def test_draining_waits_until_somebody_is_tired_of_it(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, hurry.set)
    dispatcher, _ = await ended(ledger, monkeypatch, StopReason.STOP, "drain", 0.0, hurry)
    assert dispatcher.done == ["waited", "stopped: shutdown"], "the reports get their time"


async def test_what_is_left_to_the_master_keeps_the_next_agent_silent(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert silence_left(ledger) <= 0
    await ended(ledger, monkeypatch, StopReason.STOP, "handback", left=True)
    assert 99 < silence_left(ledger) <= 100
    ledger.put("silent since", str(time.time() + 10**6))  # the clock was set back since
    assert silence_left(ledger) == 100
    ledger.put("silent since", str(time.time() - 101))
    assert silence_left(ledger) <= 0
    end_silence(ledger)
    assert silence_left(ledger) <= 0


async def ended(
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    reason: StopReason | None,
    mode: str,
    grace: float = 0.0,
    hurry: asyncio.Event | None = None,
    *,
    left: bool = False,
) -> tuple[FakeDispatcher, list[str]]:
    """Stop for a reason, None for a failure of our own; the dispatcher, and what was told."""

    async def why(_bus: object) -> StopReason:
        assert reason is not None, "there is nobody to be asked why"
        return reason

    monkeypatch.setattr("worker.ending.stop_reason", why)
    dispatcher, told = FakeDispatcher(), list[str]()
    dispatcher.left_to_the_master = left
    notifier = SimpleNamespace(stopping=told.append, extend_timeout=lambda seconds: None)
    ending = Ending(
        Settings(stop_mode=mode, stop_grace=grace),
        cast("Notifier", notifier),
        cast("Bus", None),
        cast("Dispatcher", dispatcher),
        ledger,
        hurry or asyncio.Event(),
    )
    polling = asyncio.create_task(asyncio.Event().wait())
    async with asyncio.timeout(5):
        await ending.run(polling, told=reason is not None, registered=False)  # type: ignore[arg-type]
    assert polling.cancelled()
    return dispatcher, told
