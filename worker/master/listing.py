"""The master's list of all jobs, taken apart without building it: it may be as long as it likes.

Only one element at a time becomes Python objects, which take up to fifty times the room that
the text takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MOST_TOKENS = 4_000_000
"""Texts and brackets in a list: a second's work, and 30,000 jobs."""
MOST_ELEMENTS = 200_000
LARGEST_ELEMENT = 256 * 1024
"""Bytes. A larger one is left out."""
_AT_ONCE = 2_000
"""Tokens between two opportunities to do something else."""

# Without the question mark a text that does not end would be searched for its end from each
# quotation mark in it.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_START = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*")
_NOTHING = re.compile(rb"null\b")
_COLON = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*")
_OPEN, _CLOSE = b"[{", b"]}"


Token = tuple[int, int, int]
"""The depth after it, where it begins, and where it ends."""


class NoList(ValueError):
    """The text holds no list. Says what is wrong, as the end of "the answer …"."""


def elements(text: bytes | bytearray, field: str) -> Iterator[bytes | bytearray | None]:
    """The objects and lists in a JSON list, each as text that is still to be read.

    The list is the whole text, or the ``field`` of the object that the text is; null is an
    empty one. None comes in between, where the caller should let others work. Raises NoList.
    """
    start = _START.match(text)
    assert start is not None  # it matches nothing as well
    begin: int | None = start.end()
    if text[start.end() : start.end() + 1] == b"{":
        begin = None
        for token in _tokens(text, start.end() + 1):
            if token is None:
                yield None
            elif (begin := _value(text, token, field)) is not None:
                break
    if begin is None:
        raise NoList("is no JSON list of jobs")
    if text[begin : begin + 1] == b"[":
        yield from _inside(text, begin + 1)
    elif not _NOTHING.match(text, begin):
        raise NoList("is no JSON list of jobs")


def _value(text: bytes | bytearray, token: Token, field: str) -> int | None:
    """Where the value begins, if the token is the name of the field."""
    depth, begin, end = token
    name = b'"%s"' % field.encode()
    if depth != 0 or end - begin != len(name) or text[begin:end] != name:
        return None
    colon = _COLON.match(text, end)
    return None if colon is None else colon.end()


def _inside(text: bytes | bytearray, begin: int) -> Iterator[bytes | bytearray | None]:
    element, count = begin, 0
    for token in _tokens(text, begin):
        if token is None:
            yield None
            continue
        depth, start, end = token
        if depth < 0 and text[start:end] == b"]":
            return
        if depth < 0:
            raise NoList("is no JSON")
        if depth == 1 and text[start] in _OPEN:
            element = start
            count += 1
            if count > MOST_ELEMENTS:
                raise NoList(f"lists more than {MOST_ELEMENTS} jobs")
        elif depth == 0 and text[start] in _CLOSE and end - element <= LARGEST_ELEMENT:
            yield text[element:end]
    raise NoList("is no JSON: it ends within the list")


def _tokens(text: bytes | bytearray, begin: int) -> Iterator[Token | None]:
    depth = 0
    for number, match in enumerate(_TOKEN.finditer(text, begin), 1):
        if number > MOST_TOKENS:
            raise NoList(f"holds more than {MOST_TOKENS} values")
        if number % _AT_ONCE == 0:
            yield None
        bracket = text[match.start()]
        depth += (bracket in _OPEN) - (bracket in _CLOSE)
        yield depth, *match.span()
