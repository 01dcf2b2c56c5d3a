"""Texts that leave this program: bounded, free of control characters and of secrets."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from worker.printable import escape

_ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?")
# Up to the next blank, for a password or a key may hold anything else. What stands before the
# scheme is no part of it, a letter from another script or a digit least of all. Nothing here may
# take more than linear time, whatever the text.
_URL = re.compile(r"(?<![a-zA-Z0-9+.-])[a-zA-Z0-9+.-]+://\S+")
_PHRASE_ENDS = "'\"),;:"
"""Marks that are not taken for a part of the URL that they follow."""
_URL_BEGINS = re.compile(r"(?<![a-zA-Z0-9+.-])[a-zA-Z0-9+.-]*://")
_URL_LIKE = re.compile(r"[^/]{0,40}:")
"""What may have been meant for one: in an error, a password with a slip before it stays secret."""
_MOST = 4096
"""Characters of a value that are looked at to show some of them."""
_PLAIN_AUTHORITY = re.compile(r"(?:\[[0-9A-Fa-f:.]*\]|[^:\[\]]*)(?::[0-9]*)?", re.A)
_REQUEUE = re.compile(
    r"connection refused|timeout|temporary failure|network error|no such host|broken pipe"
    r"|connection reset|node unavailable|worker died|stale",
    re.IGNORECASE,
)
_STREAM_SCHEMES = frozenset({"rtmp", "rtmps", "rtmpt", "rtmpts", "rtmpe", "rtmpte"})


def shortened(text: str, limit: int) -> str:
    """At most ``limit`` characters, with ``…`` where something was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def label(text: str, limit: int = 200) -> str:
    """A name as sent by somebody else, safe to print."""
    return shortened(escape(text[:limit]) + ("…" if len(text) > limit else ""), limit)


def plain(line: str, limit: int = 300) -> str:
    """One line of a program's output: terminal escapes dropped, the rest made printable."""
    return shortened(escape(_ESCAPE_SEQUENCE.sub("", line[: 4 * limit]).strip()), limit)


def shown(value: object, limit: int = 60) -> str:
    """``value`` for an error sentence. Never raises, never long, never a secret of a URL."""
    if isinstance(value, str):
        value = value[:_MOST]
        # From a scheme on, all is one URL, even with blanks in it, which a password may have.
        found = _URL_LIKE.match(value) or _URL_BEGINS.search(value)
        start = found.start() if found else len(value)
        text = value[:start] + (_redact_url(value[start:]) if found else "")
        return shortened(repr(escape(shortened(text, limit))), limit + 4)
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        # repr() of an int of more than 4300 digits raises ValueError.
        return repr(value) if abs(value) < 10**limit else f"a number of {value.bit_length()} bits"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    return f"a {type(value).__name__}"


def redact(text: str) -> str:
    """``text`` with what is secret in URLs replaced by ``***``.

    That is: user and password, the query (tokens, SRT passphrases), the fragment, and all of an
    RTMP path but its first element, since the stream key is in there.
    """
    return _URL.sub(_redact_match, text)


def _redact_match(match: re.Match[str]) -> str:
    url = match[0].rstrip(_PHRASE_ENDS)
    return _redact_url(url) + match[0][len(url) :]


def _redact_url(url: str) -> str:
    # By hand rather than with urlsplit alone: what is no valid URL must be redacted as well.
    scheme, colon, rest = url.partition(":")
    slashes = rest[: len(rest) - len(rest.lstrip("/"))][:2]
    rest = rest[len(slashes) :]
    rest, has_fragment, _ = rest.partition("#")
    rest, has_query, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    if "@" not in authority and (
        not _PLAIN_AUTHORITY.fullmatch(authority) or (not slash and "@" in url)
    ):
        # Perhaps a password with # or ? in it, or one without its @: nothing of it is shown.
        authority = "***"
    if "@" in path and "@" not in authority:
        # A password may hold a slash: everything up to the last @ is taken for credentials.
        authority, path = "***@" + path.rpartition("@")[2].partition("/")[0], ""
    elif "@" in authority:
        authority = "***@" + authority.rpartition("@")[2]
    if scheme.lstrip("0123456789+.-").lower() in _STREAM_SCHEMES and path:
        # "rtmp://host/app" alone has no key. What follows is one, or might be meant for one.
        app, more, _ = path.rstrip("/").partition("/")
        path = f"{app}/***" if more else path
    tail = ("?***" if has_query and query else "") + ("#***" if has_fragment else "")
    return f"{scheme}{colon}{slashes}{authority}{slash}{path}{tail}"


def without_requeue_words(text: str) -> str:
    """``text`` in which none of the words stands on which a master runs a failed job again.

    A job that fails by its own fault fails again, whatever ffmpeg or a file name said about it.
    """
    return _REQUEUE.sub(_hyphened, text)


def _hyphened(match: re.Match[str]) -> str:
    words = match[0]
    if " " in words:
        return words.replace(" ", "-")
    cut = 4 if words.lower() == "timeout" else 3
    return f"{words[:cut]}-{words[cut:]}"


def is_url(text: str) -> bool:
    """Whether ``text`` has the form of a URL, be it valid or not."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", text) is not None


def url_scheme(url: str) -> str:
    """The scheme in small letters; empty where there is none or the URL cannot be read."""
    try:
        return urlsplit(url).scheme.lower()
    except ValueError:
        return ""
