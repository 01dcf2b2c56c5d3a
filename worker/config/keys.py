"""The one table of what an operator can set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from worker.config.parsers import (
    BOOLEAN_WORDS,
    duration,
    integer,
    one_of,
    parse_address,
    parse_api_key,
    parse_bool,
    parse_dirs,
    parse_group,
    parse_jobs,
    parse_key_file,
    parse_level,
    parse_log_file,
    parse_master_url,
    parse_node_name,
    parse_owner,
    parse_readable_file,
    parse_work_dir,
    protocols,
)
from worker.jobs.policy import INPUT_PROTOCOLS, OUTPUT_PROTOCOLS

__all__ = ["BOOLEAN_WORDS", "KEYS", "MASTER_DEAD_AFTER", "Key", "integer"]

MASTER_DEAD_AFTER = 90.0
"""Seconds without a heartbeat after which the master gives a node's jobs to others."""


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
        "master_api_key_file",
        "--api-key-file",
        parse_key_file,
        "file whose first line is the bearer key, readable by its owner alone",
        "master",
        ("MASTER_API_KEY_FILE",),
        "FILE",
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
    _key(
        "job_group",
        parse_group,
        "node",
        "group that jobs run in, so that inputs can be made readable for them (ffmpeg-worker)",
        metavar="GROUP",
    ),
    _key(
        "output_owner",
        parse_owner,
        "node",
        "whose the published outputs are (ffmpeg-worker)",
        metavar="USER[:GROUP]",
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
    _key(
        "input_dirs",
        parse_dirs,
        "jobs",
        "below which jobs may read files (/var/lib/ffmpeg-worker/media)",
        metavar="DIR[:DIR]",
    ),
    _key(
        "output_dirs",
        parse_dirs,
        "jobs",
        "below which jobs may put outputs (the work directory)",
        metavar="DIR[:DIR]",
    ),
    _key(
        "input_protocols",
        protocols(*INPUT_PROTOCOLS),
        "jobs",
        "what jobs may read from (all)",
        metavar="NAME[,NAME]",
    ),
    _key(
        "output_protocols",
        protocols(*OUTPUT_PROTOCOLS),
        "jobs",
        "what jobs may write to (all)",
        metavar="NAME[,NAME]",
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
