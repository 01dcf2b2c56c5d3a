"""Asking for work: a node that is not known, and errors that say nothing of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import httpx
import pytest

from tests.fakes.master import FakeMaster
from tests.fakes.transport import REGISTRATION, client_of
from tests.unit.session.script import Time, routes
from worker.errors import MasterRefused, MasterUnreachable, Unauthorized
from worker.master.session import NodeSession


async def test_asking_for_work_registers_first(session: NodeSession, master: FakeMaster) -> None:
    assert await session.next_job() is None
    assert routes(master) == ["POST /nodes/register", "GET /jobs/next"]


async def test_an_unknown_node_is_found_out_by_a_heartbeat(
    session: NodeSession, master: FakeMaster
) -> None:
    first = await session.register()
    job = master.submit({})
    master.store.nodes.clear()
    taken = await session.next_job()
    assert taken is not None
    assert taken.id == job["id"]
    assert session.node_id != first
    assert routes(master)[1:] == [
        "GET /jobs/next", "beat", "POST /nodes/register", "GET /jobs/next",
    ]  # fmt: skip


async def test_many_who_find_the_node_unknown_register_once(
    session: NodeSession, master: FakeMaster
) -> None:
    await session.register()
    master.store.nodes.clear()
    await asyncio.gather(*(session.next_job() for _ in range(5)))
    assert len(master.seen("POST /nodes/register")) == 2
    assert list(master.store.nodes) == [session.node_id]


async def test_an_error_that_has_nothing_to_do_with_the_node_passes_on(
    session: NodeSession, master: FakeMaster, beats: list[None]
) -> None:
    await session.register()
    master.fault("GET /jobs/next", "status", body="database is locked")
    with pytest.raises(MasterRefused, match="database is locked"):
        await session.next_job()
    assert len(beats) == 1
    master.fault("GET /jobs/next", "status")
    master.fault("POST /nodes/*/heartbeat", "drop")
    with pytest.raises(MasterRefused, match="Internal Server Error"):
        await session.next_job()
    assert session.registered


@pytest.mark.parametrize("status", [400, 429, 503])
async def test_other_errors_need_no_heartbeat(
    session: NodeSession, master: FakeMaster, status: int
) -> None:
    master.fault("GET /jobs/next", "status", status=status)
    with pytest.raises(MasterRefused):
        await session.next_job()
    assert routes(master) == ["POST /nodes/register", "GET /jobs/next"]


async def test_a_refused_key_passes_on(session: NodeSession, master: FakeMaster) -> None:
    await session.register()
    master.api_key = "changed"
    with pytest.raises(Unauthorized):
        await session.next_job()


async def test_a_master_that_says_plainly_that_the_node_is_unknown(time: Time) -> None:
    ids = iter(["n1", "n2"])

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/nodes/register":
            return httpx.Response(201, json={"id": next(ids)})
        if request.url.params["node_id"] == "n1":
            return httpx.Response(404, json={"error": "Node not found"})
        return httpx.Response(200, json={"job": {"id": "j"}})

    session = NodeSession(client_of(handler), REGISTRATION, sleep=time.sleep)
    job = await session.next_job()
    assert job is not None
    assert session.node_id == "n2"


async def test_whether_the_master_answers_is_told(
    new_session: Callable[..., NodeSession], master: FakeMaster
) -> None:
    told: list[bool] = []
    session = new_session(on_answer=told.append)
    await session.next_job()
    assert told
    assert all(told)
    master.fault("GET /jobs/next", "drop")
    with pytest.raises(MasterUnreachable):
        await session.next_job()
    assert told[-1] is False
    assert session.last_error
    await session.next_job()
    assert told[-1] is True
    assert session.last_error == ""


async def test_an_outage_is_a_handful_of_lines_with_an_end(
    session: NodeSession, master: FakeMaster, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    """Heartbeats and polls fail for an hour, and it is one fact."""
    await session.register()
    session.last_heartbeat_at = 1e9  # or it would register, which is told in the same way
    caplog.clear()
    caplog.set_level(logging.INFO)
    master.fault("*", "drop", count=10**6)
    while time.now < 1000.0 + 3600.0:
        with pytest.raises(MasterUnreachable):
            await session.next_job()
        time.now += 60.0
    assert 4 <= len(caplog.records) <= 7
    master.clear_faults()
    assert await session.next_job() is None
    assert "answers again" in caplog.records[-1].getMessage()
