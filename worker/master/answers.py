"""From an HTTP answer to data, or to the error that says what the master meant.

Nothing here trusts the answer: sizes are bounded, JSON may be anything, and what is quoted
in an error is short, printable and free of the API key.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NoReturn

import httpx

from worker.errors import (
    JobUnknown,
    MasterRefused,
    MasterUnreachable,
    NodeUnknown,
    Unauthorized,
)

LONGEST_RETRY_AFTER = 3600.0
"""Seconds. A master that asks for more patience than this is asked again after an hour."""

_EXCERPT = 200
_LOOKED_AT = 4096
_DEEPEST = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer. ``peer`` is the master's host:port, ``request`` names the request."""

    peer: str
    request: str
    status: int
    headers: httpx.Headers
    body: bytes
    secret: str | None

    @property
    def ok(self) -> bool:
        """Whether the master did what it was asked."""
        return 200 <= self.status < 300

    def excerpt(self) -> str:
        """The beginning of the body, escaped, without the API key."""
        return quotable(self.body[:_LOOKED_AT].decode("utf-8", "replace"), self.secret)

    def json(self) -> object:
        """The body as JSON. Raises MasterRefused."""
        try:
            return json.loads(self.body, parse_constant=_no_constant)
        except RecursionError:
            self.refuse("is nested too deeply")
        except ValueError:
            self.refuse("is no JSON")

    def refuse(self, what: str) -> NoReturn:
        """Raise MasterRefused: the answer is not what the protocol has there."""
        raise MasterRefused(
            f"the answer of the master at {self.peer} to {self.request} {what} "
            f"(status {self.status}): {self.excerpt() or 'empty'}",
            self.status,
            self.excerpt(),
            retry_after(self.headers),
        )


def check(answer: Answer) -> None:
    """Return if the answer is a success, raise what it means otherwise.

    Raises Unauthorized, NodeUnknown, JobUnknown, MasterUnreachable or MasterRefused.
    """
    if answer.ok:
        return
    said = answer.excerpt()
    where = f"the master at {answer.peer}"
    after = retry_after(answer.headers)
    status = answer.status

    if status in (401, 403):
        doing = "check MASTER_API_KEY" if answer.secret else "MASTER_API_KEY is not set"
        raise Unauthorized(
            f"{where} refused the API key on {answer.request}: {status} {said}; {doing}",
            status,
            said,
            after,
        )
    if status == 400 and "HTTP request to an HTTPS server" in said:
        # The TLS layer said this; the master itself has seen no request.
        raise MasterUnreachable(
            f"{where} speaks TLS: MASTER_URL must begin with https://", sent=False
        )
    meaning = said or httpx.codes.get_reason_phrase(status)
    message = f"{where} refused {answer.request}: {status} {meaning}"
    if status == 404:
        if _misses(answer, "node"):
            raise NodeUnknown(message, status, said, after)
        if _misses(answer, "job"):
            raise JobUnknown(message, status, said, after)
        message += "; is MASTER_URL right?"
    elif 300 <= status < 400:
        target = quotable(answer.headers.get("location", ""), answer.secret)
        message += f"; it redirects to {target!r}, which is not followed: correct MASTER_URL"
    raise MasterRefused(message, status, said, after)


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds the master asks us to stay away (RFC 9110, Retry-After), at most an hour.

    A date is compared with the answer's own Date where it has one, so that two clocks that
    disagree do no harm.
    """
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]+", value):
        return min(float(value[:12]), LONGEST_RETRY_AFTER)
    until = _http_date(value)
    if until is None:
        return None
    now = _http_date(headers.get("date", "")) or datetime.now(UTC)
    return min(max((until - now).total_seconds(), 0.0), LONGEST_RETRY_AFTER)


def quotable(text: str, secret: str | None = None) -> str:
    """``text`` on one line, without anything unprintable, cut, and with the key blotted out."""
    if secret:
        text = text.replace(secret, "***")
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"


def deeper_than(value: object, levels: int = _DEEPEST) -> bool:
    """Whether JSON data is nested more than ``levels`` deep, found without recursion."""
    layer = [value]
    for _ in range(levels + 1):
        below: list[object] = []
        for item in layer:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return False
        layer = below
    return True


def _misses(answer: Answer, noun: str) -> bool:
    """Whether a 404 means that the thing is unknown, and not that the route is.

    Routers and proxies answer 404 too, often with the path in the text; so the wording must
    be a sentence about the thing and nothing else: ``Job not found``, ``no such job``. Masters
    that answer in JSON say it in one of the usual fields.
    """
    said = answer.body[:_LOOKED_AT].decode("utf-8", "replace")
    try:
        data = json.loads(said)
    except (ValueError, RecursionError):
        sentences = [said]
    else:
        fields = data if isinstance(data, dict) else {}
        sentences = [str(fields.get(key, "")) for key in ("error", "message", "detail", "code")]
    pattern = re.compile(
        rf"(the )?{noun}( [^\s/<>]+)? (was |is )?(not found|unknown|does not exist)"
        rf"|(no such|unknown) {noun}( [^\s/<>]+)?"
    )
    return any(
        pattern.fullmatch(sentence.casefold().replace("_", " ").strip(" \r\n.!"))
        for sentence in sentences
    )


def _http_date(value: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, IndexError, TypeError, OverflowError):
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
