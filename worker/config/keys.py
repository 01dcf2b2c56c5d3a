"""The one table of what an operator can set, and how each value is read.

A parser takes the text as written and returns the value, or raises ValueError with a sentence
that says what is accepted. The text itself is added by whoever reports it: it may be a secret.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
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
_HOST = re.compile(r"[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]+\]")
MASTER_DEAD_AFTER = 90.0
"""Seconds without a heartbeat after which the master gives a node's jobs to others."""


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
    if path == Path("/"):
        raise ValueError("must be a directory of its own, not /")
    return path


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


@dataclass(frozen=True, slots=True)
class Key:
    """One thing that can be set."""

    field: str
    """In ``Settings``; empty for what is accepted and has no effect."""
    flag: str
    parse: Callable[[str], Any]
    help: str
    group: str
    names: tuple[str, ...] = ()
    """In environment and file, the preferred one first; empty: by flag only."""
    metavar: str | None = None
    """None: a boolean, whose flag needs no value."""
    secret: bool = False

    @property
    def boolean(self) -> bool:
        return self.metavar is None


def _key(field: str, parse: Callable[[str], Any], group: str, help: str, **more: Any) -> Key:  # noqa: A002
    """The usual case: flag and variable carry the field's name."""
    more.setdefault("names", (field.upper(),))
    return Key(field, "--" + field.replace("_", "-"), parse, help, group, **more)


_IMPLIED = "accepted, and always so"
_BEAT = f": without a heartbeat for {MASTER_DEAD_AFTER:.0f}s the master gives our jobs to others"

KEYS: tuple[Key, ...] = (
    Key(
        "master_url",
        "--master",
        parse_master_url,
        "the master, http(s)://HOST[:PORT]",
        "master",
        ("MASTER_URL",),
        "URL",
    ),
    Key(
        "master_api_key",
        "--api-key",
        parse_api_key,
        "bearer key; better in the environment, as every local user sees flags",
        "master",
        ("MASTER_API_KEY", "FFMPEG_RTMP_API_KEY"),
        "KEY",
        secret=True,
    ),
    Key(
        "ca",
        "--ca",
        parse_readable_file,
        "authorities to trust for the master (PEM)",
        "master",
        ("MASTER_CA",),
        "FILE",
    ),
    Key(
        "cert",
        "--cert",
        parse_readable_file,
        "our certificate for the master (PEM)",
        "master",
        ("MASTER_CERT",),
        "FILE",
    ),
    Key(
        "key",
        "--key",
        parse_readable_file,
        "the certificate's private key (PEM)",
        "master",
        ("MASTER_KEY",),
        "FILE",
    ),
    _key("insecure_skip_verify", parse_bool, "master", "believe any certificate: only for tests"),
    _key(
        "node_name",
        parse_node_name,
        "node",
        "our address at the master (host name)",
        metavar="NAME",
    ),
    _key("max_concurrent_jobs", parse_jobs, "node", "jobs at a time, or auto (4)", metavar="N"),
    _key(
        "poll_interval",
        duration(0.1, 3600),
        "node",
        "pause after the master had no job (3s)",
        metavar="DURATION",
    ),
    _key(
        "heartbeat_interval",
        duration(1, 60, _BEAT),
        "node",
        "time between heartbeats (30s)",
        metavar="DURATION",
    ),
    _key(
        "job_check_interval",
        duration(1, 300),
        "node",
        "how often the master is asked about a running job (5s)",
        metavar="DURATION",
    ),
    _key(
        "stop_mode",
        one_of("handback", "drain", "leave"),
        "node",
        "jobs at a stop: end and give back, let finish, or leave running (handback)",
        metavar="MODE",
    ),
    _key(
        "stop_grace",
        duration(0, 3600),
        "node",
        "how long a stop with handback waits for running jobs to end (30s)",
        metavar="DURATION",
    ),
    _key(
        "history_days",
        integer(1, 3650),
        "node",
        "how long jobs that are done are remembered (7)",
        metavar="N",
    ),
    _key(
        "work_dir",
        parse_work_dir,
        "node",
        "where jobs keep their files (/var/lib/ffmpeg-worker)",
        metavar="DIR",
    ),
    Key(
        "user",
        "--user",
        parse_bool,
        "run jobs in our own service manager, not the system's",
        "node",
    ),
    _key(
        "default_cpu_percent",
        integer(1, 1_000_000, ", 100 is one core"),
        "jobs",
        "CPU of a job that names no limit (200)",
        metavar="N",
    ),
    _key(
        "default_memory_mb",
        integer(16, 1_000_000_000),
        "jobs",
        "memory of a job that names no limit (2048)",
        metavar="N",
    ),
    _key(
        "default_disk_mb",
        integer(1, 1_000_000_000),
        "jobs",
        "disk space of a job that names no limit (5000)",
        metavar="N",
    ),
    _key(
        "default_timeout_sec",
        integer(1, 31_536_000),
        "jobs",
        "run time of a job that names no limit (3600)",
        metavar="N",
    ),
    _key("generate_input", parse_bool, "jobs", "make a test video for a job without input (true)"),
    _key("persist_inputs", parse_bool, "jobs", "keep generated inputs (false)"),
    _key("persist_outputs", parse_bool, "jobs", "keep outputs at the default path (false)"),
    _key(
        "metrics_port",
        integer(0, 65535),
        "telemetry",
        "port of /metrics, /health and /ready; 0: none (9091)",
        metavar="PORT",
    ),
    _key(
        "metrics_addr", parse_address, "telemetry", "address to serve them on (all)", metavar="ADDR"
    ),
    _key(
        "log_level", parse_level, "telemetry", "debug, info, warn or error (info)", metavar="LEVEL"
    ),
    _key("log_file", parse_log_file, "telemetry", "log to this file too", metavar="FILE"),
    Key("", "--register", parse_bool, _IMPLIED, "accepted"),
    Key("", "--skip-confirmation", parse_bool, _IMPLIED, "accepted"),
    Key("", "--allow-master-as-worker", parse_bool, _IMPLIED, "accepted"),
)
