"""How an answer is received: nothing of it is followed, kept or unpacked, and all has an end."""

from __future__ import annotations

import asyncio
from http.cookiejar import CookieJar
from typing import Any

import httpx

MOST_PIECES = 20_000
"""Reads that an answer may take, each as short as the master likes."""
_PIECES_AT_ONCE = 50


class NoCookies(CookieJar):
    """Takes none: they would be kept without bound, and sent with each request."""

    def extract_cookies(self, response: Any, request: Any) -> None:
        pass


async def put_location_aside(response: httpx.Response) -> None:
    """Before httpx makes a request of it, followed or not: there are places at which that fails
    with errors that are none of httpx's."""
    response.extensions["location"] = response.headers.pop("location", "")


async def read(response: httpx.Response, limit: int) -> bytearray:
    """The body, or a bit more than ``limit`` bytes of it.

    Nothing is unpacked: a few bytes can unpack to gigabytes.
    """
    body = bytearray()
    if compressed(response):
        return body
    pieces = 0
    async for piece in response.aiter_bytes():
        body += piece
        pieces += 1
        if len(body) > limit:
            break
        if pieces > MOST_PIECES:
            raise httpx.RemoteProtocolError(f"more than {MOST_PIECES} pieces in an answer")
        if pieces % _PIECES_AT_ONCE == 0:
            await asyncio.sleep(0)  # many pieces can come in one packet
    return body


def compressed(response: httpx.Response) -> bool:
    """Whether the body is, although that was not asked for."""
    encoding: str = response.headers.get("content-encoding", "identity")
    return encoding.strip().lower() != "identity"
