"""Liberal in what is read, strict in what is no protocol, clear when nothing comes."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.fakes.master import FakeMaster
from tests.fakes.transport import REGISTRATION, answering, client_of, failing, result
from worker.errors import (
    MasterRefused,
    MasterUnreachable,
)
from worker.master import client as client_module
from worker.master.client import MasterClient

# Liberal in what is read


@pytest.mark.parametrize(
    "body",
    ['{"job": null}', "null", "{}", "", '{"job": {}}'],
)
async def test_no_job(body: str) -> None:
    client, _ = answering(httpx.Response(200, text=body))
    assert await client.next_job("n") is None


@pytest.mark.parametrize(
    "body", ['{"job": {"id": "a", "new": [1]}}', '{"id": "a", "retry_count": "x"}']
)
async def test_a_job_in_a_wrapper_or_bare(body: str) -> None:
    client, seen = answering(httpx.Response(200, text=body))
    job = await client.next_job("a node&x=y")
    assert job is not None
    assert (job.id, job.retry_count) == ("a", 0)
    assert seen[0].url.query == b"node_id=a%20node%26x%3Dy"


@pytest.mark.parametrize(
    "job",
    [
        '{"scenario": "x"}', '{"id": 7}', '{"id": ""}', '{"id": null}', '["id"]', '"id"', "7",
        '{"id": "\\ud800"}',
    ],
)  # fmt: skip
async def test_a_job_that_could_not_be_reported(job: str, caplog: pytest.LogCaptureFixture) -> None:
    client, _ = answering(httpx.Response(200, text=f'{{"job": {job}}}'))
    with pytest.raises(MasterRefused, match="no job with an id"):
        await client.next_job("n")
    assert "neither run nor reported" in caplog.text


@pytest.mark.parametrize(
    ("body", "ids"),
    [
        ('{"count": 0, "jobs": null}', []),
        ('{"jobs": []}', []),
        ("null", []),
        ('[{"id": "a"}]', ["a"]),
        ('{"jobs": [{"id": "a"}, {"id": 5}, null, {"id": "b"}]}', ["a", "b"]),
    ],
)
async def test_lists(body: str, ids: list[str]) -> None:
    client, _ = answering(httpx.Response(200, text=body))
    assert [job.id for job in await client.jobs()] == ids


@pytest.mark.parametrize("body", ['{"jobs": {}}', '{"count": 0}', "7"])
async def test_no_list(body: str) -> None:
    client, _ = answering(httpx.Response(200, text=body))
    with pytest.raises(MasterRefused, match="no JSON list of jobs"):
        await client.jobs()


async def test_a_node_in_a_wrapper() -> None:
    client, _ = answering(httpx.Response(201, json={"node": {"id": "n1"}}))
    assert (await client.register(REGISTRATION)).id == "n1"


@pytest.mark.parametrize("body", ["{}", '{"id": 4}', '{"id": ""}', "[]", '{"id": "\\udfff"}'])
async def test_a_node_without_an_id(body: str) -> None:
    client, _ = answering(httpx.Response(200, text=body))
    with pytest.raises(MasterRefused, match="no usable node id"):
        await client.register(REGISTRATION)


async def test_a_result_may_be_taken_without_a_word() -> None:
    client, _ = answering(httpx.Response(204))
    assert (await client.post_result(result())).status == "success"
    client, _ = answering(httpx.Response(200, text="[]"))
    with pytest.raises(MasterRefused, match="no JSON object"):
        await client.post_result(result())


async def test_what_is_sent_is_json() -> None:
    client, seen = answering(httpx.Response(200, json={"status": "success"}))
    await client.post_result(result())
    assert seen[0].headers["content-type"] == "application/json"
    assert json.loads(seen[0].content)["job_id"] == "j"


# Strict in what is not the protocol


async def test_redirects_are_not_followed() -> None:
    client, seen = answering(httpx.Response(307, headers={"location": "http://evil/"}))
    with pytest.raises(MasterRefused, match="not followed"):
        await client.heartbeat("n")
    assert len(seen) == 1


async def test_compressed_answers_are_not_unpacked() -> None:
    client, seen = answering(
        httpx.Response(200, headers={"content-encoding": "gzip"}, stream=Bytes([b"\x1f\x8b"]))
    )
    with pytest.raises(MasterRefused, match="compressed"):
        await client.jobs()
    assert seen[0].headers["accept-encoding"] == "identity"


class Bytes(httpx.AsyncByteStream):
    def __init__(self, chunks: list[bytes]) -> None:
        self.left = chunks
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self.left:
            yield self.left.pop(0)

    async def aclose(self) -> None:
        self.closed = True


async def test_an_endless_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MOST_BYTES_OF_A_LIST", 100)
    stream = Bytes([b"x" * 60] * 50)
    client, _ = answering(httpx.Response(200, stream=stream))
    with pytest.raises(MasterRefused, match="longer than"):
        await client.jobs()
    assert stream.left
    assert stream.closed


async def test_garbage_and_half_an_answer() -> None:
    with FakeMaster() as master:
        master.fault("GET /jobs", "garbage")
        master.fault("GET /jobs", "half")
        master.fault("GET /jobs", "drop")
        async with MasterClient(base_url=master.url) as client:
            with pytest.raises(MasterRefused, match=r"no JSON.*it works"):
                await client.jobs()
            for _ in range(2):
                with pytest.raises(MasterUnreachable, match="connection broke") as caught:
                    await client.jobs()
                assert caught.value.sent
            assert await client.jobs() == []


async def test_busy_says_when_to_come_back() -> None:
    with FakeMaster() as master:
        master.fault("POST /nodes/*", "status", status=503, headers={"Retry-After": "9"})
        async with MasterClient(base_url=master.url) as client:
            with pytest.raises(MasterRefused, match="503") as caught:
                await client.register(REGISTRATION)
    assert caught.value.retry_after == 9.0


async def test_a_master_that_does_not_answer_in_time() -> None:
    with FakeMaster() as master:
        master.fault("GET /jobs", "hang", count=2)
        async with MasterClient(base_url=master.url, timeout=0.05) as client:
            with pytest.raises(MasterUnreachable, match="too long to answer") as caught:
                await client.jobs()
            assert caught.value.sent
        async with MasterClient(base_url=master.url, deadline=0.05) as client:
            with pytest.raises(MasterUnreachable, match=r"GET /jobs within 0\.05 s") as caught:
                await client.jobs()
            assert caught.value.sent


async def test_a_request_can_be_cancelled() -> None:
    with FakeMaster() as master:
        master.fault("GET /jobs", "hang")
        async with MasterClient(base_url=master.url) as client:
            request = asyncio.create_task(client.jobs())
            await asyncio.to_thread(master.wait_for_request, "GET /jobs")
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request


async def test_nobody_listens() -> None:
    with FakeMaster() as master:
        url = master.url
    async with MasterClient(base_url=url) as client:
        with pytest.raises(
            MasterUnreachable, match=r"127\.0\.0\.1:\d+: connection refused"
        ) as caught:
            await client.jobs()
    assert not caught.value.sent


@pytest.mark.parametrize(
    ("error", "sent", "said"),
    [
        (httpx.ConnectError("boom"), False, "boom"),
        (httpx.ConnectTimeout(""), False, "firewall"),
        (httpx.PoolTimeout(""), False, "under way"),
        (httpx.ReadTimeout(""), True, "too long to answer"),
        (httpx.WriteTimeout(""), True, "too long to answer"),
        (httpx.ReadError(""), True, "connection broke"),
        (httpx.WriteError(""), True, "connection broke"),
        (httpx.RemoteProtocolError("Server disconnected"), True, "Server disconnected"),
        (OSError(113, "No route to host"), True, "No route to host"),
    ],
)
async def test_no_answer(error: Exception, *, sent: bool, said: str) -> None:
    with pytest.raises(MasterUnreachable, match="box:8080") as caught:
        await failing(error).post_result(result())
    assert caught.value.sent is sent
    assert said in str(caught.value)


async def test_a_reset_under_tls_may_mean_a_missing_client_certificate() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("") from ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(MasterUnreachable, match="reset by peer; if the master wants a client"):
        await client_of(handler, "https://box").jobs()
    with pytest.raises(MasterUnreachable, match=r"reset by peer$"):
        await client_of(handler).jobs()


async def test_a_name_that_does_not_resolve() -> None:
    cause = socket.gaierror(-2, "Name or service not known")
    outer = httpx.ConnectError("All connection attempts failed")
    outer.__cause__ = ExceptionGroup("several", [cause])
    with pytest.raises(MasterUnreachable, match="cannot be resolved"):
        await failing(outer).jobs()


async def test_the_last_of_two_fields_counts_and_a_mark_at_the_beginning_does_not() -> None:
    client, _ = answering(httpx.Response(200, content=b'\xef\xbb\xbf{"id": "a", "id": "b"}'))
    job = await client.next_job("n")
    assert job is not None
    assert job.id == "b"
