"""``ffmpeg-worker check``: the configuration in force, and where each value comes from."""

from __future__ import annotations

import sys

from pydantic import SecretStr

from worker.config import KEYS, Resolved
from worker.config.durations import format_duration
from worker.printable import escape

_DURATIONS = frozenset(key.field for key in KEYS if key.metavar == "DURATION")


def run(resolved: Resolved) -> int:
    """Print one line a key to stdout, the warnings to stderr; returns the exit status."""
    lines = rows(resolved)
    widths = [max(len(row[column]) for row in lines) for column in (0, 1)]
    for name, value, source in lines:
        print(f"{name:{widths[0]}}  {value:{widths[1]}}  {source}")
    for warning in resolved.warnings:
        print(f"ffmpeg-worker: warning: {escape(warning)}", file=sys.stderr)
    return 0


def rows(resolved: Resolved) -> list[tuple[str, str, str]]:
    """Name, value and source of each key, fit to be shown."""
    return [
        (
            (key.names or (key.flag,))[0],
            _shown(key.field, getattr(resolved.settings, key.field)),
            escape(resolved.sources[key.field]),
        )
        for key in KEYS
        if key.field
    ]


def _shown(field: str, value: object) -> str:
    if isinstance(value, SecretStr):
        return "********"
    if isinstance(value, bool):
        return "true" if value else "false"
    if field in _DURATIONS and isinstance(value, float):
        return format_duration(value)
    if isinstance(value, frozenset):
        return ",".join(sorted(value))
    if isinstance(value, tuple):
        return escape(":".join(map(str, value)))
    if value is None or value == "":
        return "-"
    return escape(str(value))
