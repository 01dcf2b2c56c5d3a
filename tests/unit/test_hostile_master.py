"""A master that wants to hurt: no answer of it ends the agent, fills it, or has it give away."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import httpx
import pytest

from tests.fakes.transport import REGISTRATION, answering, client_of, result
from worker.errors import JobError, MasterError, MasterRefused, MasterUnreachable, Reason
from worker.jobs.values import mapping
from worker.master import listing
from worker.master import session as session_module
from worker.master.answers import MOST_VALUES, Answer, quotable
from worker.master.client import MOST_BYTES, MasterClient
from worker.master.reception import MOST_PIECES
from worker.master.session import MOST_NODE_IDS, NodeSession
from worker.master.wire import MOST_CHARACTERS, MOST_PARTS
from worker.printable import is_plain
from worker.telemetry import logs

KEY = "s3cret/key+with=marks"
MIB = 1024 * 1024
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def whole(body: bytes, head: bytes = b"") -> bytes:
    return OK + head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def endless(head: bytes, piece: bytes) -> Iterator[bytes]:
    yield head
    while True:
        yield piece


def job_with(parameters: str) -> bytes:
    return whole(b'{"job": {"id": "x", "parameters": %s}}' % parameters.encode())


# What comes over the wire

Say = Callable[[Iterable[bytes]], MasterClient]


@pytest.fixture
async def say() -> AsyncIterator[Say]:
    """A client of a master that says what it is given, for as long as somebody listens."""
    script: list[Iterable[bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            for piece in script.pop(0):
                writer.write(piece)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = MasterClient(base_url=f"http://127.0.0.1:{port}", api_key=KEY, deadline=20.0)

    def answer(pieces: Iterable[bytes]) -> MasterClient:
        script[:] = [pieces]
        return client

    async with client:
        yield answer
    server.close()


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([OK + b"Content-Length: 104857600\r\n\r\n", *[b"x" * MIB] * 100], "is longer than"),
        (endless(CHUNKED, b"10000\r\n" + b"x" * 0x10000 + b"\r\n"), "is longer than"),
        (endless(OK + b"\r\n", b"x" * 65536), "is longer than"),
        (endless(CHUNKED, b"1\r\nx\r\n" * 1000), f"more than {MOST_PIECES} pieces"),
        ([whole(gzip.compress(bytes(MIB)), b"Content-Encoding: gzip\r\n")], "is compressed"),
        ([whole(b"{}", b"Content-Encoding: br\r\nContent-Encoding: identity\r\n")], "compressed"),
        ([OK + b"X: " + b"a" * 10 * MIB + b"\r\n\r\n"], "buffer too long"),
        ([OK, *(b"h%d: 1\r\n" % n for n in range(30_000))], "buffer too long"),
        ([b"HTTP/1.1 200 " + b"a" * MIB + b"\r\n\r\n"], "buffer too long"),
        ([b"HTTP/1.1 500 " + b"\x1b[2J" * 9 + b"\r\nContent-Length: 0\r\n\r\n"], "500"),
        ([b"\0\xff" * 1000], "does not speak HTTP"),
        ([b"SSH-2.0-" + KEY.encode() + b"\r\n\r\n"], "illegal status line"),
        ([OK + b"Bad Header\x1b: x\r\n\r\n"], "illegal header line"),
        ([OK + b"Content-Length: -1\r\n\r\n"], "bad Content-Length"),
        ([OK + b"Content-Length: 99\r\n\r\n{}"], "connection broke"),
        ([CHUNKED + b"zz\r\n"], "illegal chunk header"),
        ([b"HTTP/1.1 101 Switching Protocols\r\n\r\n"], "connection broke"),
        ([b"HTTP/1.1 999 \r\nContent-Length: 0\r\n\r\n"], "999"),
        ([whole(b"\xff\xfe{}")], "is no JSON"),
        ([whole(b'{"job": {"id": "\xff"}}')], "is no JSON"),
        ([whole(b'{"job": {"id": "a", "x": NaN}}')], "is no JSON"),
        ([job_with("[" * 100_000 + "]" * 100_000)], "more than 50000 values"),
        ([job_with("[" * 40_000 + "]" * 40_000)], "nested too deeply"),
        ([job_with("[" + "[[[[[]]]]]," * 90_000 + "0]")], "more than 50000 values"),
        ([job_with("{" + ",".join(f'"{n:x}":0' for n in range(90_000)) + "}")], "50000 values"),
        ([job_with("9" * 10_000)], "is no JSON"),
        ([whole(b'{"job": {"id": "%s"}}' % (b"a" * 1025))], "no job with an id"),
        ([whole(b'{"job": {"id": ["a"]}}')], "no job with an id"),
    ],
)  # fmt: skip
async def test_what_is_no_answer_is_a_short_sentence(
    say: Say, pieces: Iterable[bytes], said: str
) -> None:
    client = say(pieces)
    with pytest.raises(MasterError) as caught:
        await client.next_job("n")
    text = str(caught.value)
    assert said in text
    assert len(text) < 500
    assert is_plain(text)
    assert KEY not in text
    assert await say([whole(b'{"job": {"id": "next"}}')]).next_job("n") is not None


async def test_an_answer_that_never_ends_is_given_up() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            for piece in endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"):
                writer.write(piece * 100)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with MasterClient(base_url=f"http://127.0.0.1:{port}", deadline=0.3) as client:
        with pytest.raises(MasterUnreachable, match=r"no complete answer.* within 0\.3 s"):
            await client.heartbeat("n")
    server.close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 200])
@pytest.mark.parametrize(
    "location",
    [
        "http://elsewhere/", "//xn--a", "//xn--#..com\u00e9", "user:pw@foohttp:user:pw@.", "1@[::1",
        "http://[", "//" + "a" * 70_000, "\x7f", "", "javascript:alert(1)", "http://x:99999999/",
    ],
)  # fmt: skip
async def test_no_place_is_gone_to(status: int, location: str) -> None:
    client, seen = answering(
        httpx.Response(status, headers=[(b"Location", location.encode())], text="{}")
    )
    with contextlib.suppress(MasterRefused):
        await client.heartbeat("n")
    assert [str(request.url) for request in seen] == ["http://box:8080/nodes/n/heartbeat"]


async def test_no_cookie_is_kept() -> None:
    client, seen = answering(
        httpx.Response(200, headers=[("Set-Cookie", "a=b; Path=/"), ("Alt-Svc", 'h2="evil:443"')]),
        httpx.Response(200),
    )
    await client.heartbeat("n")
    await client.heartbeat("n")
    assert "cookie" not in seen[1].headers
    assert seen[1].url.host == "box"
    assert not client._http.cookies


# How much room it takes


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes of Python objects that were there at the same time."""
    tracemalloc.start()
    try:
        with contextlib.suppress(MasterRefused):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def read(body: bytes) -> Answer:
    return Answer("box:1", "GET /x", 200, httpx.Headers(), body, None)


@pytest.mark.parametrize("piece", ["[[[[[]]]]],", "{},", '{"a":0},', "[0],", "999,"])
def test_the_densest_answers_stay_small(piece: str) -> None:
    body = ("[" + piece * (MOST_BYTES // len(piece) - 1) + "0]").encode()
    assert peak_of(lambda: read(body).json()) < 3 * MIB
    fits = ("[" + piece * (MOST_VALUES // (2 * len(piece))) + "0]").encode()
    assert peak_of(lambda: read(fits).json()) < 8 * MIB
    assert read(fits).json()


@pytest.mark.parametrize("piece", ["[[[[[]]]]],", '{"id":"a"},', '{"id":"' + "b" * 90_000 + '"},'])
def test_a_list_costs_its_text_and_one_element(piece: str) -> None:
    body = ('{"jobs":[' + piece * (MIB // 4 // len(piece)) + "0]}").encode()
    assert peak_of(lambda: [None for _ in read(body).elements("jobs")]) < 2 * MIB


def test_an_element_that_is_too_large_is_left_out() -> None:
    dense = '{"id":"a","x":[' + "[[[[[]]]]]," * (listing.LARGEST_ELEMENT // 11 - 10) + "0]},"
    long = '{"id":"a","x":"' + "b" * listing.LARGEST_ELEMENT + '"},'
    body = ("[" + dense + long + '{"id":"c"}]').encode()
    found: list[object] = []
    assert peak_of(lambda: found.extend(read(body).elements("jobs"))) < 2 * MIB
    assert [item for item in found if item is not None] == [{"id": "c"}]


# A job


@pytest.mark.parametrize(
    "field", ["parameters", "scenario", "engine", "wrapper_constraints", "queue", "resource_limits"]
)
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("a" * (MOST_CHARACTERS + 1), "too long"),
        ({"a": ["b" * 1000] * 200}, "too long"),
        ({"k" * (MOST_CHARACTERS + 1): 1}, "too long"),
        ([0] * (MOST_PARTS + 1), "too many"),
        ({str(n): [] for n in range(MOST_PARTS)}, "too many"),
        ([10**4000] * 120, "too long"),
        (json.loads("[" * 70 + "]" * 70), "too deep"),
    ],
)
async def test_a_job_that_is_too_large_fails_by_itself(
    field: str, value: object, said: str
) -> None:
    body = {"job": {"id": "a", "sequence_number": 3, field: value}}
    client, _ = answering(httpx.Response(200, text=json.dumps(body)))
    job = await client.next_job("n")
    assert job is not None
    assert (job.id, job.sequence_number) == ("a", 3)
    with pytest.raises(JobError, match=said) as caught:
        mapping(job.parameters, "parameters")
    assert caught.value.reason is Reason.USER_ERROR
    assert len(str(caught.value)) < 200
    kept = job.model_dump(exclude={"parameters"})
    assert len(json.dumps(kept, default=str)) < 1000


# Over time


async def test_what_is_kept_of_many_jobs_and_node_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MOST_TAKEN", 100)
    names: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        names.append(f"{len(names)}-" + "\u00e9" * 1000)
        if request.url.path == "/nodes/register":
            return httpx.Response(200, json={"id": names[-1]})
        if len(names) % 3 == 0:
            return httpx.Response(404, text="Node not found")
        return httpx.Response(200, json={"job": {"id": names[-1]}})

    session = NodeSession(client_of(handler), REGISTRATION)
    for _ in range(300):
        await session.next_job(set())
    assert len(session._taken) == 100
    assert max(map(len, session._taken)) == 16
    assert len(session.node_ids) == MOST_NODE_IDS
    assert session.node_ids[-1] == session.node_id
    assert len(set(session.node_ids)) == MOST_NODE_IDS


# What it would have us say

FORMS = [
    KEY,
    "s3cret%2Fkey%2bwith%3Dmarks",
    "".join(f"%{byte:02X}" for byte in KEY.encode()),
    "s3cret%252Fkey%252Bwith%253Dmarks",
    "s3cret\\/key+with=marks",
    "s3cret\\\\/key\\u002Bwith\\u003dmarks",
    "s3cret/key\\x2bwith=marks",
    "s3cret&#x2F;key&#43;with=marks",
    "QXV0aG9yaXphdGlvbjogQmVhcmVyIHMzY3JldC9rZXkrd2l0aD1tYXJrcw==",
    "QmVhcmVyIHMzY3JldC9rZXkrd2l0aD1tYXJrcw",
    "czNjcmV0L2tleSt3aXRoPW1hcmtz",
    "IHMzY3JldC9rZXkrd2l0aD1tYXJrcwo=",
]
"""The key, as it may come back."""
REVEALING = ("s3cret", "marks", "NyZXQva2V5K3dpdGg9bWFya", "3JldC9rZXkrd2l0aD1tYXJr", "2V5")


def reveals(text: str) -> bool:
    return any(part in text for part in REVEALING) or "%73%33%63" in text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("status", [200, 301, 400, 401, 404, 500])
async def test_the_key_is_shown_in_no_form(
    form: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    headers = {"Location": f"/?{form}", "Retry-After": form, "Date": form, "WWW-Authenticate": form}

    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, text=f"you said {form}!", headers=headers)

    client = MasterClient(
        base_url="http://box", api_key=KEY, transport=httpx.MockTransport(handler)
    )
    with pytest.raises(MasterError) as caught:
        await client.post_result(result())
    shown = f"{caught.value} {caught.value!r} {vars(caught.value)} {client!r} {caplog.text}"
    assert not reveals(shown), shown


@pytest.mark.parametrize("form", FORMS)
def test_the_key_is_in_no_log(form: str) -> None:
    try:
        raise ValueError(f"b'{form}'")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("httpcore", 10, "", 1, "sent %r", ([form],), info)
    assert not reveals(logs.LineFormatter(journal=True, secrets=[KEY]).format(record))


def test_a_key_that_a_cut_goes_through_is_not_shown() -> None:
    for filled in range(4096 - len(KEY) - 1, 4100):
        assert not reveals(quotable(" " * filled + KEY, KEY))
    for filled in range(8192 - len(KEY) - 1, 8196):
        record = logging.LogRecord("x", 10, "", 1, "a" * filled + KEY, None, None)
        assert not reveals(logs.LineFormatter(journal=True, secrets=[KEY]).format(record))


def test_an_answer_shows_neither_body_nor_key() -> None:
    answer = Answer("p", "GET /", 200, httpx.Headers({"a": KEY}), KEY.encode(), KEY, KEY)
    assert "s3cret" not in repr(answer)


async def test_of_a_job_that_cannot_be_read_nothing_is_quoted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    body = '{"job": {"id": 7, "parameters": {"stream_key": "opensesame"}}}'
    client, _ = answering(httpx.Response(200, text=body), httpx.Response(200, text=body[:-1]))
    for _ in range(2):
        with pytest.raises(MasterRefused) as caught:
            await client.next_job("n")
        assert "opensesame" not in str(caught.value) + caught.value.body + caplog.text
