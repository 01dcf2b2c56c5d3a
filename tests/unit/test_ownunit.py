"""Why the agent is told to stop, by what systemd says and by how it says it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import cast

import pytest

from worker.errors import BusGone, BusTimeout, NoSuchUnit, SystemdError
from worker.systemd.bus import Bus
from worker.systemd.ownunit import StopReason, all_stops, stop_reason

UNIT = "/org/freedesktop/systemd1/unit/own"
JOB = "/org/freedesktop/systemd1/job/7"


class FakeBus:
    """Says what the test has it say: a value, an error, or nothing at all (None)."""

    def __init__(self, job_type: object = "stop", *, state: str = "running") -> None:
        self.answers: dict[str, list[object]] = {
            "SystemState": [state],
            "GetUnitByPID": [UNIT],
            "Job": [[7, JOB] if job_type else [0, "/"]],
            "JobType": [job_type],
        }
        self.connected = asyncio.Event()
        self.connected.set()
        self.waited_for = asyncio.Event()

    async def _answer(self, what: str) -> object:
        answers = self.answers[what]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def get(self, path: str, interface: str, name: str) -> object:
        expected = {"Job": UNIT, "JobType": JOB}
        assert path == expected.get(name, "/org/freedesktop/systemd1")
        return await self._answer(name)

    async def call(self, member: str, signature: str, body: Sequence[object]) -> list[object]:
        return [await self._answer(member)]

    async def wait_connected(self) -> None:
        self.waited_for.set()
        await self.connected.wait()

    async def ask(self, limit: float = 5) -> StopReason:
        return await stop_reason(cast("Bus", self), limit)


@pytest.mark.parametrize(
    ("job_type", "reason"),
    [
        ("restart", StopReason.RESTART),
        ("try-restart", StopReason.RESTART),
        ("stop", StopReason.STOP),
        ("start", StopReason.SIGNAL),
        ("", StopReason.SIGNAL),
    ],
)
async def test_what_is_queued(job_type: str, reason: StopReason) -> None:
    assert await FakeBus(job_type).ask() is reason


@pytest.mark.parametrize("job_type", ["restart", "stop", ""])
async def test_a_shutdown_goes_before_all_else(job_type: str) -> None:
    assert await FakeBus(job_type, state="stopping").ask() is StopReason.SHUTDOWN


@pytest.mark.parametrize(
    "error",
    [
        SystemdError("PID 1 is of no unit", "org.freedesktop.systemd1.NoUnitForPID"),
        NoSuchUnit("not loaded", "org.freedesktop.systemd1.NoSuchUnit"),
    ],
)
async def test_no_service_at_all(error: SystemdError) -> None:
    bus = FakeBus()
    bus.answers["GetUnitByPID"] = [error]
    assert await bus.ask() is StopReason.SIGNAL


async def test_a_job_replaced_while_we_ask() -> None:
    bus = FakeBus()
    gone = SystemdError("Unknown object", "org.freedesktop.DBus.Error.UnknownObject")
    bus.answers["JobType"] = [gone, "stop"]
    assert await bus.ask() is StopReason.STOP


async def test_a_bus_that_comes_back() -> None:
    bus = FakeBus()
    bus.answers["Job"].insert(0, BusGone("lost"))
    bus.answers["JobType"].insert(0, BusTimeout("slow"))
    bus.connected.clear()
    asking = asyncio.create_task(bus.ask())
    await asyncio.wait_for(bus.waited_for.wait(), 5)
    assert not asking.done()
    bus.connected.set()
    assert await asking is StopReason.STOP


@pytest.mark.parametrize("trouble", ["gone", "hangs", "refuses"])
async def test_no_answer_is_taken_for_a_restart_and_soon(
    trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    bus = FakeBus()
    if trouble == "gone":
        bus.connected.clear()
        bus.answers["SystemState"] = [BusGone("lost")]
    elif trouble == "hangs":
        bus.answers["SystemState"] = [None]
    else:
        bus.answers["GetUnitByPID"] = [SystemdError("denied", "org.freedesktop.DBus.Error.X")]
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert await bus.ask(limit=0.1) is StopReason.RESTART
    assert time.monotonic() - begun < 2
    assert "taken for a restart" in caplog.text
    assert ("denied" if trouble == "refuses" else "no answer in 0.1 s") in caplog.text


@pytest.mark.parametrize("state", ["running", "degraded", "maintenance", "stopping"])
async def test_whether_all_units_are_stopped(state: str) -> None:
    assert await all_stops(cast("Bus", FakeBus(state=state))) is (state == "stopping")


@pytest.mark.parametrize("answer", [None, BusGone("lost")])
async def test_a_shutdown_is_not_assumed(answer: object, caplog: pytest.LogCaptureFixture) -> None:
    bus = FakeBus(state="stopping")
    bus.answers["SystemState"] = [answer]
    with caplog.at_level(logging.WARNING):
        assert await all_stops(cast("Bus", bus), limit=0.1) is False
    assert "whether the machine is being shut down: " in caplog.text
