"""A job handed out in an answer that was lost."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from tests.fakes.master import FakeMaster
from tests.fakes.transport import REGISTRATION, client_of
from tests.unit.session.script import Time
from worker.errors import MasterRefused, MasterUnreachable
from worker.master import session as session_module
from worker.master.session import NodeSession


@pytest.mark.parametrize("kind", ["lose", "half"])
async def test_a_job_lost_in_transit_is_taken_up(
    session: NodeSession, master: FakeMaster, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    job = master.submit({"scenario": "first"})
    master.fault("GET /jobs/next", kind)  # type: ignore[arg-type]
    with pytest.raises(MasterUnreachable):
        await session.next_job(held=set())
    assert master.job(job["id"])["status"] == "processing"
    master.submit({"scenario": "second"})

    taken = await session.next_job(held=set())
    assert taken is not None
    assert taken.scenario == "first"
    assert "did not arrive" in caplog.text

    following = await session.next_job(held={taken.id})
    assert following is not None
    assert following.scenario == "second"
    await session.next_job(held={taken.id, following.id})
    assert len(master.seen("GET /jobs")) == 2, "no more doubt, no more lists"


async def test_jobs_of_others_and_ended_ones_are_not_taken_up(
    session: NodeSession, master: FakeMaster
) -> None:
    node_id = await session.register()
    master.submit({}, {"status": "processing", "node_id": "other"})
    master.submit({}, {"status": "completed", "node_id": node_id})
    master.submit({}, {"status": "canceled", "node_id": node_id})
    master.fault("GET /jobs/next", "drop")
    with pytest.raises(MasterUnreachable):
        await session.next_job(held=set())
    assert await session.next_job(held=set()) is None


async def test_without_knowing_what_is_held_nothing_is_taken_up(
    session: NodeSession, master: FakeMaster
) -> None:
    master.submit({})
    master.fault("GET /jobs/next", "lose")
    with pytest.raises(MasterUnreachable):
        await session.next_job()
    assert await session.next_job() is None
    assert not master.seen("GET /jobs")


async def test_a_request_that_never_left_raises_no_doubt(time: Time) -> None:
    paths: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        if request.url.path == "/nodes/register":
            return httpx.Response(201, json={"id": "n1"})
        if len(paths) == 2:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json={"job": None})

    session = NodeSession(client_of(handler), REGISTRATION, sleep=time.sleep)
    with pytest.raises(MasterUnreachable):
        await session.next_job(held=set())
    assert await session.next_job(held=set()) is None
    assert paths == ["/nodes/register", "/jobs/next", "/jobs/next"]


async def test_the_same_acceptance_is_never_recovered(
    session: NodeSession, master: FakeMaster
) -> None:
    """The master did not want its result, so there the job goes on for ever."""
    master.submit({})
    job = await session.next_job(held=set())
    assert job is not None
    master.fault("GET /jobs/next", "drop")
    with pytest.raises(MasterUnreachable):
        await session.next_job(held={job.id})
    assert await session.next_job(held=set()) is None


async def test_an_acceptance_of_an_earlier_run_is_never_recovered(
    new_session: Callable[..., NodeSession], master: FakeMaster
) -> None:
    earlier = new_session()
    master.submit({})
    job = await earlier.next_job()
    assert job is not None
    session = new_session(in_doubt=True)
    session.remember(job)
    assert await session.next_job(held=set()) is None


async def test_a_job_handed_to_an_earlier_id_of_ours_is_taken_up(
    new_session: Callable[..., NodeSession], master: FakeMaster
) -> None:
    """The agent was killed at once, and the master knows the next one by another id."""
    ids: list[str] = []

    async def remember(node_id: str) -> None:
        assert ours.node_id == node_id
        assert not master.seen("GET /jobs/next"), "before anything is done under it"
        ids.append(node_id)

    ours = new_session(in_doubt=True, node_ids=["an-older-one"], on_registered=remember)
    lost = master.submit({}, {"status": "processing", "node_id": "an-older-one"})
    taken = await ours.next_job(held=set())
    assert taken is not None
    assert taken.id == lost["id"]
    assert ids == [ours.node_id]


async def test_a_job_that_another_process_here_runs_is_left_to_it(
    new_session: Callable[..., NodeSession], master: FakeMaster
) -> None:
    other = new_session()
    master.submit({})
    job = await other.next_job()
    assert job is not None
    session = new_session(in_doubt=True, run_by_others=lambda job_id: job_id == job.id)
    assert await session.next_job(held=set()) is None


@pytest.mark.parametrize("kind", ["status", "garbage"])
async def test_a_list_that_cannot_be_had_keeps_nobody_from_working(
    new_session: Callable[..., NodeSession], master: FakeMaster, time: Time, kind: str
) -> None:
    session = new_session(in_doubt=True)
    node_id = await session.register()
    lost = master.submit({}, {"status": "processing", "node_id": node_id})
    job = master.submit({})
    master.fault("GET /jobs", kind, count=1)  # type: ignore[arg-type]

    taken = await session.next_job(held=set())
    assert taken is not None
    assert taken.id == job["id"]
    await session.next_job(held={taken.id})
    assert len(master.seen("GET /jobs")) == 1, "a list can be long: it is not asked for at once"

    time.now += 60.0
    recovered = await session.next_job(held={taken.id})
    assert recovered is not None
    assert recovered.id == lost["id"]


async def test_jobs_held_under_an_earlier_id_are_recovered_too(
    session: NodeSession, master: FakeMaster
) -> None:
    first = await session.register()
    lost = master.submit({})
    master.fault("GET /jobs/next", "lose")
    with pytest.raises(MasterUnreachable):
        await session.next_job(held=set())
    with master.store.changed:
        master.store.nodes[first]["current_job_id"] = None
    session.registered = False  # as after a long silence
    job = await session.next_job(held=set())
    assert session.node_id != first
    assert job is not None
    assert job.id == lost["id"]


async def test_a_costly_list_is_not_looked_at_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    lists = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal lists
        if request.url.path == "/nodes/register":
            return httpx.Response(200, json={"id": "n"})
        if request.url.path == "/jobs":
            lists += 1
            return httpx.Response(200, json=[])
        return httpx.Response(503, text="doubt")

    session = NodeSession(client_of(handler), REGISTRATION, clock=lambda: now, in_doubt=True)
    monkeypatch.setattr(session_module, "COSTLY", -1.0)
    monkeypatch.setattr(session_module, "CPU_SHARE", 1e-9)
    for _ in range(3):
        with pytest.raises(MasterRefused):
            await session.next_job(set())
    assert lists == 1
    now += 1e12
    with pytest.raises(MasterRefused):
        await session.next_job(set())
    assert lists == 2
