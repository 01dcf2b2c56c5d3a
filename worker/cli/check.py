"""``ffmpeg-worker check``: the configuration in force, and where each value comes from."""

from __future__ import annotations

import sys

from pydantic import SecretStr

from worker.config import KEYS, Resolved
from worker.config.durations import format_duration
from worker.telemetry.logs import escape

_DURATIONS = frozenset({"poll_interval", "heartbeat_interval"})


def run(resolved: Resolved) -> int:
    """Print one line a key to stdout, the warnings to stderr; returns the exit status."""
    rows = [
        (
            (key.names or (key.flag,))[0],
            _shown(key.field, getattr(resolved.settings, key.field)),
            resolved.sources[key.field],
        )
        for key in KEYS
        if key.field
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, source in rows:
        print(f"{name:{widths[0]}}  {value:{widths[1]}}  {escape(source)}")
    for warning in resolved.warnings:
        print(f"ffmpeg-worker: warning: {escape(warning)}", file=sys.stderr)
    return 0


def _shown(field: str, value: object) -> str:
    if isinstance(value, SecretStr):
        return "********"
    if isinstance(value, bool):
        return "true" if value else "false"
    if field in _DURATIONS and isinstance(value, float):
        return format_duration(value)
    if value is None or value == "":
        return "-"
    return escape(str(value))
