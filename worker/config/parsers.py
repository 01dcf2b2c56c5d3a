"""How each value is read: one parser for each kind of key.

A parser takes the text as written and returns the value, or raises ValueError with a sentence
that says what is accepted. The text itself is added by whoever reports it: it may be a secret.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from worker.config.durations import format_duration, parse_duration
from worker.node.cpu import usable_cpus

_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})
BOOLEAN_WORDS = _TRUE | _FALSE
_LEVELS = {"debug": "debug", "info": "info", "warn": "warning", "warning": "warning"} | {
    "error": "error"
}
_NODE_NAME = re.compile(r"[A-Za-z0-9_.:\[\]/-]{1,253}")
_ACCOUNT = re.compile(r"[a-z_][a-z0-9_-]{0,31}\$?|[0-9]{1,10}")
"""Names as useradd(8) accepts them."""
_HOST = re.compile(r"[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]+\]")


def parse_bool(text: str) -> bool:
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError("must be true or false (or 1, 0, t, f)")


def integer(low: int, high: int, what: str = "") -> Callable[[str], int]:
    accepted = f"must be a whole number from {low} to {high}{what}"

    def parse(text: str) -> int:
        # int() would also take "1_000", " 1" and other scripts' digits
        if not re.fullmatch(r"[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(accepted)
        return int(text)

    return parse


def duration(low: float, high: float, why: str = "") -> Callable[[str], float]:
    accepted = f"must be from {format_duration(low)} to {format_duration(high)}{why}"

    def parse(text: str) -> float:
        seconds = parse_duration(text)
        if not low <= seconds <= high:
            raise ValueError(accepted)
        return seconds

    return parse


def one_of(*words: str) -> Callable[[str], str]:
    accepted = f"must be {', '.join(words[:-1])} or {words[-1]}"

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(accepted)
        return text

    return parse


def parse_jobs(text: str) -> int:
    """``auto`` is three quarters of the CPUs that jobs may use."""
    if text == "auto":
        return max(1, usable_cpus() * 3 // 4)
    try:
        return integer(1, 1000)(text)
    except ValueError as error:
        raise ValueError(f"{error}, or auto (three quarters of the CPUs)") from None


def parse_master_url(text: str) -> str:
    accepted = "must be http://HOST[:PORT] or https://HOST[:PORT]"
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise ValueError(accepted) from None
    if not text.isascii() or not text.isprintable() or " " in text or port == 0:
        raise ValueError(accepted)
    if "@" in url.netloc:
        raise ValueError("must not hold a name or password, it would be logged; use MASTER_API_KEY")
    host = url.netloc.removesuffix(f":{port}") if port is not None else url.netloc
    if url.scheme not in ("http", "https") or not _HOST.fullmatch(host.removesuffix(":")):
        raise ValueError(accepted)
    if url.query or url.fragment:
        raise ValueError(f"{accepted}, without ? and #")
    if "MASTER_IP" in host:
        raise ValueError("is the placeholder still; put the master's name or address in")
    return text.rstrip("/:")


def parse_api_key(text: str) -> str:
    """RFC 9110, field values: what cannot stand in a header cannot be a key."""
    if not re.fullmatch(r"[!-~]{1,4096}", text):
        raise ValueError("must be visible ASCII characters without blanks, at most 4096")
    return text


def parse_node_name(text: str) -> str:
    if not _NODE_NAME.fullmatch(text):
        raise ValueError("must be 1 to 253 letters, digits or any of _ . - : / [ ]")
    return text


def parse_address(text: str) -> str:
    try:
        return text if text == "localhost" else str(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        raise ValueError("must be an IPv4 or IPv6 address of this machine, or localhost") from None


def parse_level(text: str) -> str:
    try:
        return _LEVELS[text.lower()]
    except KeyError:
        raise ValueError("must be debug, info, warn (or warning) or error") from None


def parse_work_dir(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or ".." in path.parts or not text.isprintable():
        raise ValueError("must be an absolute path without '..'")
    # Two slashes in front mean one on Linux, but Path keeps them apart.
    path = Path("/", *path.parts[1:])
    if path == Path("/"):
        raise ValueError("must be a directory of its own, not /")
    return path


def parse_dirs(text: str) -> tuple[Path, ...]:
    """Directories, separated by ``:`` or ``,``; each once, in the order given."""
    try:
        dirs = [parse_work_dir(part.strip()) for part in re.split("[:,]", text) if part.strip()]
    except ValueError as error:
        raise ValueError(f"{error}, in each place of a list with ':' between them") from None
    if not dirs:
        raise ValueError("must name one directory at least, each an absolute path")
    return tuple(dict.fromkeys(dirs))


def protocols(*known: str) -> Callable[[str], frozenset[str]]:
    accepted = f"must be names out of {', '.join(known)}, with commas between them"

    def parse(text: str) -> frozenset[str]:
        names = frozenset(re.split("[, ]+", text.strip(", ").lower()))
        if not names <= frozenset(known):
            raise ValueError(accepted)
        return names

    return parse


def parse_owner(text: str) -> str:
    """``user`` or ``user:group``, by name or number; whether they exist is not judged here."""
    user, colon, group = text.partition(":")
    if not _ACCOUNT.fullmatch(user) or (colon and not _ACCOUNT.fullmatch(group)):
        raise ValueError("must be USER or USER:GROUP, each the name or number of an account")
    return text


def parse_group(text: str) -> str:
    if not _ACCOUNT.fullmatch(text):
        raise ValueError("must be the name or number of a group")
    return text


def parse_key_file(text: str) -> Path:
    """Only the name: the file is opened if the key is taken from it."""
    if not text.startswith("/") or not text.isprintable():
        raise ValueError("must be the absolute path of a file")
    return Path(text)


def parse_log_file(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or not text.isprintable() or path.is_dir():
        raise ValueError("must be the absolute path of a file")
    return path


def parse_readable_file(text: str) -> Path:
    path = Path(text)
    try:
        with path.open("rb"):
            return path.absolute()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"must be a file that can be read: {reason}") from None
