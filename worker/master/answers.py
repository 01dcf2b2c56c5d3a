"""From an HTTP answer to data, or to the error that says what the master meant.

Nothing here trusts the answer: sizes are bounded, JSON may be anything, and what is quoted
in an error is short, printable and free of the API key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import NoReturn

import httpx

from worker.errors import (
    JobUnknown,
    MasterRefused,
    MasterUnreachable,
    NodeUnknown,
    Unauthorized,
)
from worker.jobs.text import redact
from worker.master import listing
from worker.printable import blotter, is_plain

LONGEST_RETRY_AFTER = 3600.0
"""Seconds. A master that asks for more patience than this is asked again after an hour."""

MOST_VALUES = 50_000
"""In an answer. Lists in lists take 50 bytes for each byte of their text."""

_EXCERPT = 200
_LOOKED_AT = 4096
_HALF_A_KEY = 1024
"""Characters at the place of a cut that are not shown: a key that is cut is not recognised."""
_LONGEST_DATE = 100
_VALUES = (b",", b"[", b"{")
_VALUE_OR_TEXT = re.compile(rb'[,\[{]|"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer. ``peer`` is the master's host:port, ``request`` names the request.

    Its representation shows neither the body nor the key.
    """

    peer: str
    request: str
    status: int
    headers: httpx.Headers = field(repr=False)
    body: bytes | bytearray = field(repr=False)
    secret: str | None = field(repr=False)
    location: str = field(default="", repr=False)

    @property
    def ok(self) -> bool:
        """Whether the master did what it was asked."""
        return 200 <= self.status < 300

    def excerpt(self) -> str:
        """The beginning of the body, escaped, without the API key.

        Of a success that looks like JSON nothing is shown: it may be a job, with stream keys.
        """
        if self.ok and self.body[:_LOOKED_AT].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
            return f"{len(self.body)} bytes"
        return quotable(self.body[: 4 * _LOOKED_AT].decode("utf-8", "replace"), self.secret)

    def json(self) -> object:
        """The body as JSON. Raises MasterRefused."""
        if _too_many_values(self.body):
            self.refuse(f"holds more than {MOST_VALUES} values")
        try:
            return _read(self.body)
        except RecursionError:
            self.refuse("is nested too deeply")
        except ValueError:
            self.refuse("is no JSON")

    def elements(self, name: str) -> Iterator[object]:
        """The objects of a list that may be long, one after the other; see ``listing``.

        What is no JSON, or too large, is left out. None comes in between, where the caller
        should let others work. Raises MasterRefused.
        """
        try:
            for text in listing.elements(self.body, name):
                if text is None or _too_many_values(text):
                    yield None
                    continue
                try:
                    yield _read(text)
                except (ValueError, RecursionError):
                    continue
        except listing.NoList as error:
            self.refuse(str(error))

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
        target = quotable(answer.location, answer.secret)
        message += f"; it redirects to {target!r}, which is not followed: correct MASTER_URL"
    raise MasterRefused(message, status, said, after)


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds the master asks us to stay away (RFC 9110, Retry-After), at most an hour.

    A date is compared with the answer's own Date where it has one, so that two clocks that
    disagree do no harm.
    """
    value = headers.get("retry-after", "")[:_LONGEST_DATE].strip()
    if re.fullmatch(r"[0-9]+", value):
        return min(float(value[:12]), LONGEST_RETRY_AFTER)
    until = _http_date(value)
    if until is None:
        return None
    now = _http_date(headers.get("date", "")[:_LONGEST_DATE]) or datetime.now(UTC)
    return min(max((until - now).total_seconds(), 0.0), LONGEST_RETRY_AFTER)


def quotable(text: str, secret: str | None = None) -> str:
    """``text`` on one line, cut, with nothing that cannot be seen, the API key, or a URL's keys."""
    cut = len(text) > _LOOKED_AT
    text = _blotter(secret)(text[:_LOOKED_AT])
    if cut:
        text = text[:-_HALF_A_KEY]
    text = "".join(c if is_plain(c) else " " for c in text)
    text = redact(" ".join(text.split()))
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"


@lru_cache(maxsize=8)
def _blotter(secret: str | None) -> Callable[[str], str]:
    return blotter([secret] if secret else [], "***")


def _too_many_values(text: bytes | bytearray) -> bool:
    if sum(map(text.count, _VALUES)) <= MOST_VALUES:
        return False
    values = 0  # those within texts do not count, and telling them apart takes longer
    for match in _VALUE_OR_TEXT.finditer(text):
        values += text[match.start()] != ord('"')
        if values > MOST_VALUES:
            return True
    return False


def _read(text: bytes | bytearray) -> object:
    """JSON as RFC 8259 has it: in UTF-8, without NaN. Raises ValueError, RecursionError."""
    return json.loads(text.decode("utf-8-sig"), parse_constant=_no_constant)


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
