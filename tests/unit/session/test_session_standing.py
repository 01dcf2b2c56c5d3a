"""Staying registered with a master that forgets, dies, comes back and changes its mind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from tests.fakes.master import FakeMaster
from tests.unit.session.script import Time, nothing, routes, run
from worker.master.session import NodeSession

# Registration


async def test_nothing_is_claimed_before_the_master_answered(session: NodeSession) -> None:
    assert session.node_id is None
    assert not session.registered
    assert session.last_heartbeat_at is None


async def test_registration(session: NodeSession, master: FakeMaster, time: Time) -> None:
    node_id = await session.register()
    assert list(master.store.nodes) == [node_id] == [session.node_id]
    assert session.registered
    assert session.last_heartbeat_at == time.now
    assert await session.register() == node_id
    assert routes(master) == ["POST /nodes/register"]


async def test_what_is_said_about_the_node_is_logged(
    session: NodeSession, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await session.register()
    assert f"as node {session.node_id} (box)" in caplog.text


async def test_a_master_that_is_down_is_waited_for(
    session: NodeSession, master: FakeMaster, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    master.fault("POST /nodes/register", "drop", count=7)
    master.fault("POST /nodes/register", "status", status=502, count=1)
    seen: list[str] = []
    time.script = [lambda: seen.append(session.last_error)] * 8
    await session.register()
    assert time.waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert all("no answer from the master" in error for error in seen[:7])
    assert "502" in seen[7]
    assert session.last_error == ""
    # Failures at 0, 1, 3, 7, 15, 31, 61 and 91 s: one complaint at once, then one a minute.
    assert [r.levelname for r in caplog.records].count("WARNING") == 2


async def test_a_refused_key_is_tried_slowly_and_explained(
    session: NodeSession, master: FakeMaster, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    master.api_key = "other"

    def mend() -> None:
        master.api_key = None

    time.script = [nothing, nothing, nothing, nothing, mend]
    await session.register()
    assert time.waits == [60.0, 90.0, 150.0, 270.0, 300.0]
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert errors
    assert "MASTER_API_KEY is not set" in errors[0]


async def test_callers_share_a_registration(session: NodeSession, master: FakeMaster) -> None:
    ids = await asyncio.gather(*(session.register() for _ in range(8)))
    assert len(set(ids)) == 1
    assert routes(master) == ["POST /nodes/register"]


async def test_a_cancelled_caller_leaves_the_registration_to_the_next(
    session: NodeSession, master: FakeMaster
) -> None:
    master.fault("POST /nodes/register", "hang")
    first = asyncio.create_task(session.register())
    await asyncio.to_thread(master.wait_for_request, "POST /nodes/register")
    second = asyncio.create_task(session.register())
    first.cancel()
    assert await second == session.node_id
    with pytest.raises(asyncio.CancelledError):
        await first


# Heartbeats


async def test_the_first_heartbeat_comes_at_once(
    session: NodeSession, master: FakeMaster, time: Time, beats: list[None]
) -> None:
    time.script = [nothing, nothing]
    await run(session)
    assert routes(master) == ["POST /nodes/register", "beat", "beat", "beat"]
    assert time.waits == [30.0, 30.0, 30.0]
    assert len(beats) == 3
    assert session.last_heartbeat_at == time.now - 30.0


async def test_heartbeats_are_early_at_random_and_never_late(
    new_session: Callable[..., NodeSession], time: Time
) -> None:
    asked: list[tuple[float, float]] = []

    def lowest(low: float, high: float) -> float:
        asked.append((low, high))
        return low

    await run(new_session(uniform=lowest))
    assert asked == [(0.9, 1.0)]
    assert time.waits == [27.0]


async def test_a_lost_heartbeat_is_repeated_soon(
    session: NodeSession, master: FakeMaster, time: Time, beats: list[None]
) -> None:
    master.fault("POST /nodes/*/heartbeat", "drop", count=6)
    time.script = [nothing] * 7
    await run(session)
    assert time.waits == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 30.0, 30.0]
    assert session.registered
    assert session.last_error == ""
    assert len(beats) == 2
    assert routes(master).count("POST /nodes/register") == 1


async def test_trouble_shows_while_it_lasts(
    session: NodeSession, master: FakeMaster, time: Time
) -> None:
    master.fault("POST /nodes/*/heartbeat", "status", status=500, body="database is locked")
    await run(session)
    assert "status 500" in session.last_error
    assert "locked" not in session.last_error  # /ready shows it, and a master may say anything
    assert session.registered


@pytest.mark.parametrize(("asked_for", "waited"), [("20", 21.0), ("3600", 61.0)])
async def test_the_master_may_ask_for_patience(
    session: NodeSession, master: FakeMaster, time: Time, asked_for: str, waited: float
) -> None:
    """But not for so long that it takes us for dead."""
    headers = {"Retry-After": asked_for}
    master.fault("POST /nodes/*/heartbeat", "status", status=429, headers=headers)
    await run(session)
    assert time.waits == [waited]


async def test_a_key_that_is_refused_later(
    session: NodeSession, master: FakeMaster, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    def lock() -> None:
        master.api_key = "changed"

    time.script = [lock]
    await run(session)
    assert time.waits == [30.0, 60.0]
    assert "MASTER_API_KEY" in session.last_error
    assert any(r.levelname == "ERROR" for r in caplog.records)


async def test_a_forgotten_node_registers_again(
    session: NodeSession, master: FakeMaster, time: Time
) -> None:
    ids: list[str | None] = []

    def forget() -> None:
        ids.append(session.node_id)
        master.store.nodes.clear()

    time.script = [forget]
    await run(session)
    assert ids != [session.node_id]
    assert list(master.store.nodes) == [session.node_id]
    assert routes(master) == [
        "POST /nodes/register", "beat", "beat", "POST /nodes/register", "beat",
    ]  # fmt: skip


async def test_after_a_long_silence_a_heartbeat_would_not_do(
    session: NodeSession, master: FakeMaster, time: Time
) -> None:
    """The master keeps a dead node offline, whatever it sends, until it registers."""

    def outage() -> None:
        time.now += 95.0
        master.store.tick()
        assert session.node_id is not None
        assert master.store.nodes[session.node_id]["status"] == "offline"

    time.script = [outage]
    await run(session)
    assert routes(master) == ["POST /nodes/register", "beat", "POST /nodes/register", "beat"]
    assert session.node_id is not None
    assert master.store.nodes[session.node_id]["status"] == "available"


async def test_a_node_that_lost_its_row_gets_a_new_id(
    session: NodeSession, master: FakeMaster, time: Time
) -> None:
    """A dead node that held a job is recovered into a row that registration replaces."""
    master.submit({})
    first = await session.register()
    assert await session.next_job() is not None

    def outage() -> None:
        time.now += 95.0
        master.store.tick()

    time.script = [outage]
    await run(session)
    assert session.node_id != first
    assert list(master.store.nodes) == [session.node_id]
