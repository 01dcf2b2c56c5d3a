"""A list of jobs, read element by element."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.fakes.transport import answering
from worker.errors import MasterRefused
from worker.master import listing
from worker.master.answers import Answer


def found_in(body: bytes) -> list[object]:
    return list(Answer("box:1", "GET /jobs", 200, httpx.Headers(), body, None).elements("jobs"))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"' + b'\\"' * 200_000, "no JSON list"),
        (b'{"jobs": ["' + b'\\"' * 200_000, "ends within"),
        (b'{"jobs": [{"id": "a"}', "ends within"),
        (b'{"a": {"jobs": [{}]}}', "no JSON list"),
        (b'{"a": "jobs", "b": [{}]}', "no JSON list"),
        (b'"jobs"', "no JSON list"),
        (b'{"jobs": "x"}', "no JSON list"),
        (b"[{]}]", "no JSON"),
        (b"", "no JSON list"),
    ],
)
def test_no_list(body: bytes, said: str) -> None:
    with pytest.raises(MasterRefused, match=said):
        found_in(body)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'\xef\xbb\xbf {"count": 1, "x": ["jobs", {"jobs": 5}], "jobs": [{"a": "]}"}]}',
         [{"a": "]}"}]),
        (b'[{"a": [1, {"b": []}]}, 5, "x", null, [2], {1} , {"c": "\\\\"}]',
         [{"a": [1, {"b": []}]}, [2], {"c": "\\"}]),
        (b'{"jobs": null}', []),
        (b' null ', []),
    ],
)  # fmt: skip
def test_a_list(body: bytes, found: list[object]) -> None:
    assert [item for item in found_in(body) if item is not None] == found


def test_a_list_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MOST_ELEMENTS", 10)
    assert len(found_in(b"[" + b"{}," * 10 + b"0]")) == 10
    with pytest.raises(MasterRefused, match="more than 10 jobs"):
        found_in(b"[" + b"{}," * 11 + b"0]")
    monkeypatch.setattr(listing, "MOST_TOKENS", 10)
    with pytest.raises(MasterRefused, match="more than 10 values"):
        found_in(b"[" + b'"a",' * 11 + b"0]")


@pytest.mark.parametrize("piece", [b'{"id":5},', b'"a",', b'{"id":"a"},', b"[[[]]],"])
async def test_a_long_list_lets_others_work(piece: bytes) -> None:
    body = b"[" + piece * 40_000 + b"0]"
    client, _ = answering(httpx.Response(200, content=body))
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    assert await client.jobs(lambda job: False) == []
    task.cancel()
    assert turns > 10
