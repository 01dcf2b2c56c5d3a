"""The client against answers of every kind."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest

from tests.fakes.master import FakeMaster
from tests.fakes.transport import KEY, REGISTRATION, answering, client_of, result, text
from worker.errors import (
    ConfigError,
    JobUnknown,
    MasterRefused,
    NodeUnknown,
    Unauthorized,
)
from worker.master.client import MasterClient
from worker.master.wire import Job

# Construction


@pytest.mark.parametrize(
    "url",
    ["", "box:8080", "ftp://box", "http://", "http://b/?a=b", "http://b/#a", "http://[", "/x"],
)  # fmt: skip
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="MASTER_URL"):
        MasterClient(base_url=url)


def test_credentials_in_the_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="MASTER_API_KEY") as caught:
        MasterClient(base_url="https://user:hunter2@box")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["caf\u00e9", "two\nlines", " led", "nul\x00"])
def test_a_key_that_no_header_carries_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ConfigError, match="MASTER_API_KEY") as caught:
        MasterClient(base_url="http://box", api_key=key)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://box:8080", "http://box:8080/nodes/n/heartbeat"),
        ("http://box:8080/", "http://box:8080/nodes/n/heartbeat"),
        ("https://box/api/v1/", "https://box/api/v1/nodes/n/heartbeat"),
        ("http://[::1]:8080", "http://[::1]:8080/nodes/n/heartbeat"),
    ],
)
async def test_the_base_url_may_have_a_path(url: str, asked: str) -> None:
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(200)

    async with client_of(handler, url) as client:
        await client.heartbeat("n")
    assert seen == [asked]


async def test_the_key_is_a_bearer_token_and_shown_nowhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    client, seen = answering(text(401, f"Invalid API key {KEY}"), httpx.Response(200))
    with pytest.raises(Unauthorized) as caught:
        await client.heartbeat("n")
    await client.heartbeat("n")
    assert [r.headers["authorization"] for r in seen] == [f"Bearer {KEY}"] * 2
    assert KEY not in repr(client) + str(caught.value) + caught.value.body + caplog.text


async def test_without_a_key_no_header_is_sent() -> None:
    with FakeMaster() as master:
        async with MasterClient(base_url=master.url, api_key="") as client:
            await client.register(REGISTRATION)
        assert "Authorization" not in master.requests[0].headers


async def test_proxies_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with FakeMaster() as master:
        async with MasterClient(base_url=master.url) as client:
            await client.register(REGISTRATION)


# Over a socket: the way of a job


async def test_the_way_of_a_job() -> None:
    with FakeMaster(api_key=KEY) as master:
        submitted = master.submit({"scenario": "720p30-h264", "parameters": {"bitrate": "1M"}})
        async with MasterClient(base_url=master.url, api_key=KEY) as client:
            node = await client.register(REGISTRATION)
            await client.heartbeat(node.id)
            job = await client.next_job(node.id)
            assert job is not None
            assert (job.id, job.node_id, job.status) == (submitted["id"], node.id, "processing")
            assert job.parameters == {"bitrate": "1M"}
            assert job.created_at is not None
            assert await client.next_job(node.id) is None
            assert (await client.job(job)).id == job.id
            answer = await client.post_result(result(job.id))
            assert (answer.status, answer.retry) == ("success", None)
            assert (await client.job(job)).status == "completed"
            assert [j.id for j in await client.jobs()] == [job.id]
        assert len({request.peer for request in master.requests}) == 1, "not kept alive"


async def test_a_failed_job_is_retried() -> None:
    with FakeMaster() as master:
        master.submit({})
        async with MasterClient(base_url=master.url) as client:
            node = await client.register(REGISTRATION)
            job = await client.next_job(node.id)
            assert job is not None
            answer = await client.post_result(result(job.id, "failed"))
            assert (answer.status, answer.retry, answer.max_retries) == ("retrying", 1, 3)


async def test_a_wrong_key() -> None:
    with FakeMaster(api_key=KEY) as master:
        async with MasterClient(base_url=master.url, api_key="other") as client:
            with pytest.raises(Unauthorized, match="Invalid API key"):
                await client.register(REGISTRATION)
        async with MasterClient(base_url=master.url) as client:
            with pytest.raises(Unauthorized, match="MASTER_API_KEY is not set"):
                await client.jobs()


async def test_an_unknown_node() -> None:
    with FakeMaster() as master:
        async with MasterClient(base_url=master.url) as client:
            with pytest.raises(NodeUnknown):
                await client.heartbeat("nobody")
            with pytest.raises(MasterRefused, match="Failed to get next job") as caught:
                await client.next_job("nobody")
    assert caught.value.status == 500


async def test_an_unknown_job() -> None:
    with FakeMaster() as master:
        async with MasterClient(base_url=master.url) as client:
            for job in (Job(id="a1"), Job(id="41"), Job(id="x", sequence_number=3)):
                with pytest.raises(JobUnknown):
                    await client.job(job)
            with pytest.raises(MasterRefused, match="Failed to update job status") as caught:
                await client.post_result(result("nothing"))
    assert caught.value.status == 500


# The state of a job


async def test_an_id_is_never_taken_for_a_number() -> None:
    with FakeMaster() as master:
        for number in range(4):
            master.submit({"scenario": str(number)}, {"id": f"4{number}-job"})
        master.submit({}, {"id": "00a-job"})
        async with MasterClient(base_url=master.url) as client:
            by_number = await client.job(Job(id="42-job", sequence_number=3))
            assert by_number.id == "42-job"
            without = await client.job(Job(id="42-job"))
            assert without.id == "42-job"
            assert (await client.job(Job(id="00a-job"))).id == "00a-job"
        assert [r.path for r in master.requests] == ["/jobs/3", "/jobs", "/jobs/00a-job"]


async def test_an_answer_about_another_job_is_not_believed() -> None:
    with FakeMaster() as master:
        master.submit({}, {"id": "a-first"})
        master.submit({}, {"id": "4-second"})
        async with MasterClient(base_url=master.url) as client:
            found = await client.job(Job(id="4-second", sequence_number=1))
            assert found.id == "4-second"
            with pytest.raises(JobUnknown, match="no job 5-third"):
                await client.job(Job(id="5-third", sequence_number=1))


async def test_a_master_that_knows_no_numbers_is_asked_by_id() -> None:
    job = {"id": "abc", "status": "processing"}
    client, seen = answering(text(404, "Job not found"), httpx.Response(200, json=job))
    found = await client.job(Job(id="abc", sequence_number=7))
    assert found.status == "processing"
    assert [r.url.path for r in seen] == ["/jobs/7", "/jobs/abc"]


async def test_a_master_without_that_route_is_asked_for_all() -> None:
    jobs = {"jobs": [{"id": "abc", "status": "paused"}]}
    client, _ = answering(text(404, "404 page not found"), httpx.Response(200, json=jobs))
    assert (await client.job(Job(id="abc"))).status == "paused"


async def test_a_master_that_cannot_be_asked_at_all() -> None:
    client, _ = answering(text(404, "404 page not found"), httpx.Response(405))
    with pytest.raises(MasterRefused) as caught:
        await client.job(Job(id="abc"))
    assert type(caught.value) is MasterRefused
    assert caught.value.status == 405


async def test_unknown_stands_if_there_is_no_list() -> None:
    client, _ = answering(text(404, "Job not found"), text(404, "404 page not found"))
    with pytest.raises(JobUnknown):
        await client.job(Job(id="41", sequence_number=9))


async def test_a_failing_look_up_is_no_unknown_job() -> None:
    client, _ = answering(text(500, "database is locked"))
    with pytest.raises(MasterRefused, match="database is locked"):
        await client.job(Job(id="abc"))
    client, _ = answering(text(401, "Invalid API key"))
    with pytest.raises(Unauthorized):
        await client.job(Job(id="abc"))


@pytest.mark.parametrize("job_id", ["../results", "a/b?c=d#e", "..", ".", "a b%2F", "\u00e9\n"])
async def test_an_id_stays_one_segment_of_the_path(job_id: str) -> None:
    client, seen = answering(httpx.Response(200, json={"id": job_id}))
    assert (await client.job(Job(id=job_id))).id == job_id
    path = seen[0].url.raw_path.decode()
    assert path.startswith("/jobs/")
    assert path.count("/") == 2
    assert "?" not in path
    assert path.rpartition("/")[2] not in {".", ".."}


async def test_reports_without_an_answer_leave_room_for_heartbeats() -> None:
    with FakeMaster() as master:
        master.submit({})
        async with MasterClient(base_url=master.url) as client:
            node = await client.register(REGISTRATION)
            master.fault("POST /results", "hang", count=100)
            reports = [asyncio.create_task(client.post_result(result())) for _ in range(40)]
            await asyncio.to_thread(master.wait_for_request, "POST /results", 8)
            async with asyncio.timeout(5):
                await client.heartbeat(node.id)
                assert await client.next_job(node.id) is not None
            for report in reports:
                report.cancel()
            await asyncio.gather(*reports, return_exceptions=True)
            master.released.set()
