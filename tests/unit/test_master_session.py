"""Staying registered with a master that forgets, dies, comes back and changes its mind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest

from tests.fakes.master import FakeMaster
from worker.errors import MasterRefused, MasterUnreachable, Unauthorized
from worker.master.client import MasterClient
from worker.master.session import NodeSession
from worker.master.wire import NodeRegistration

REGISTRATION = NodeRegistration(
    address="box", type="server", cpu_threads=8, cpu_model="x", has_gpu=False, ram_total_bytes=1
)


class Enough(Exception):
    """Ends a loop that does not end by itself."""


class Time:
    """A clock that moves only when somebody sleeps. The last step of the script ends it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []
        self.script: list[Callable[[], object]] = []

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        if not self.script:
            raise Enough
        self.script.pop(0)()

    def clock(self) -> float:
        return self.now


def nothing() -> None:
    """A step of the script in which nothing happens."""


def highest(low: float, high: float) -> float:
    return high


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def master(time: Time) -> Iterator[FakeMaster]:
    with FakeMaster(clock=time.clock) as master:
        yield master


@pytest.fixture
async def client(master: FakeMaster) -> AsyncIterator[MasterClient]:
    async with MasterClient(base_url=master.url) as client:
        yield client


@pytest.fixture
def beats() -> list[None]:
    return []


@pytest.fixture
def session(client: MasterClient, time: Time, beats: list[None]) -> NodeSession:
    return NodeSession(
        client,
        REGISTRATION,
        heartbeat_interval=30.0,
        on_heartbeat=lambda: beats.append(None),
        clock=time.clock,
        sleep=time.sleep,
        uniform=highest,
    )


async def run(session: NodeSession) -> None:
    with pytest.raises(Enough):
        await session.run()


def routes(master: FakeMaster) -> list[str]:
    names = []
    for request in master.requests:
        name = f"{request.method} {request.path}"
        names.append("beat" if name.endswith("/heartbeat") else name)
    return names


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
    client: MasterClient, time: Time
) -> None:
    asked: list[tuple[float, float]] = []

    def lowest(low: float, high: float) -> float:
        asked.append((low, high))
        return low

    session = NodeSession(
        client, REGISTRATION, clock=time.clock, sleep=time.sleep, uniform=lowest
    )  # fmt: skip
    await run(session)
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


async def test_the_master_may_ask_for_patience(
    session: NodeSession, master: FakeMaster, time: Time
) -> None:
    headers = {"Retry-After": "20"}
    master.fault("POST /nodes/*/heartbeat", "status", status=429, headers=headers)
    await run(session)
    assert time.waits == [21.0]


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


# Work


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

    client = MasterClient(base_url="http://box", transport=httpx.MockTransport(handler))
    session = NodeSession(client, REGISTRATION, sleep=time.sleep)
    job = await session.next_job()
    assert job is not None
    assert session.node_id == "n2"


# A job handed out in an answer that was lost


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

    client = MasterClient(base_url="http://box", transport=httpx.MockTransport(handler))
    session = NodeSession(client, REGISTRATION, sleep=time.sleep)
    with pytest.raises(MasterUnreachable):
        await session.next_job(held=set())
    assert await session.next_job(held=set()) is None
    assert paths == ["/nodes/register", "/jobs/next", "/jobs/next"]


async def test_what_is_said_about_the_node_is_logged(
    session: NodeSession, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await session.register()
    assert f"as node {session.node_id} (box)" in caplog.text


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
    client: MasterClient, master: FakeMaster, time: Time
) -> None:
    earlier = NodeSession(client, REGISTRATION, clock=time.clock, sleep=time.sleep)
    master.submit({})
    job = await earlier.next_job()
    assert job is not None
    session = NodeSession(
        client, REGISTRATION, in_doubt=True, clock=time.clock, sleep=time.sleep
    )  # fmt: skip
    session.remember(job)
    assert await session.next_job(held=set()) is None


async def test_a_job_handed_to_an_earlier_id_of_ours_is_taken_up(
    client: MasterClient, master: FakeMaster, time: Time
) -> None:
    """The agent was killed at once, and the master knows the next one by another id."""
    ids: list[str] = []

    async def remember(node_id: str) -> None:
        assert ours.node_id == node_id
        assert not master.seen("GET /jobs/next"), "before anything is done under it"
        ids.append(node_id)

    ours = NodeSession(
        client, REGISTRATION, in_doubt=True, node_ids=["an-older-one"], on_registered=remember,
        clock=time.clock, sleep=time.sleep,
    )  # fmt: skip
    lost = master.submit({}, {"status": "processing", "node_id": "an-older-one"})
    taken = await ours.next_job(held=set())
    assert taken is not None
    assert taken.id == lost["id"]
    assert ids == [ours.node_id]


async def test_a_job_that_another_process_here_runs_is_left_to_it(
    client: MasterClient, master: FakeMaster, time: Time
) -> None:
    other = NodeSession(client, REGISTRATION, clock=time.clock, sleep=time.sleep)
    master.submit({})
    job = await other.next_job()
    assert job is not None
    session = NodeSession(
        client, REGISTRATION, in_doubt=True, run_by_others=lambda job_id: job_id == job.id,
        clock=time.clock, sleep=time.sleep,
    )  # fmt: skip
    assert await session.next_job(held=set()) is None


@pytest.mark.parametrize("kind", ["status", "garbage"])
async def test_a_list_that_cannot_be_had_keeps_nobody_from_working(
    client: MasterClient, master: FakeMaster, time: Time, kind: str
) -> None:
    session = NodeSession(
        client, REGISTRATION, in_doubt=True, clock=time.clock, sleep=time.sleep
    )  # fmt: skip
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


async def test_retry_after_never_makes_the_master_take_us_for_dead(
    session: NodeSession, master: FakeMaster, time: Time
) -> None:
    headers = {"Retry-After": "3600"}
    master.fault("POST /nodes/*/heartbeat", "status", status=429, headers=headers)
    await run(session)
    assert time.waits == [61.0]


async def test_whether_the_master_answers_is_told(client: MasterClient, master: FakeMaster) -> None:
    told: list[bool] = []
    session = NodeSession(client, REGISTRATION, on_answer=told.append)
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
