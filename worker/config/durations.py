"""Durations as Go writes them (the ``time.ParseDuration`` syntax): ``3s``, ``1m30s``, ``1.5h``."""

from __future__ import annotations

import re
from fractions import Fraction

_NANOSECONDS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,  # U+00B5, micro sign
    "μs": 1_000,  # U+03BC, Greek mu: Go takes both
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)")
_LARGEST_NS = 2**63 - 1  # Go counts in a signed 64-bit number of nanoseconds

EXAMPLES = "a duration such as 500ms, 3s, 1m30s or 1.5h"


def parse_duration(text: str) -> float:
    """Seconds. Raises ValueError with what is accepted where ``text`` is no duration."""
    sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if rest == "0":  # the only number that needs no unit
        return 0.0
    if _NUMBER.fullmatch(text):
        raise ValueError(f"has no unit: write {text}s, {text}m or the like")
    total, position = Fraction(0), 0
    while part := _PART.match(rest, position):
        total += Fraction(part[1].rstrip(".")) * _NANOSECONDS[part[2]]
        position = part.end()
    if position == 0 or position != len(rest) or total > _LARGEST_NS:
        raise ValueError(f"must be {EXAMPLES}")
    return sign * float(total / 1_000_000_000)


def format_duration(seconds: float) -> str:
    """The shortest usual way to write it: ``3s``, ``1m30s``, ``500ms``."""
    if 0 < abs(seconds) < 1:
        return f"{seconds * 1000:g}ms"
    sign = "-" if seconds < 0 else ""
    minutes, rest = divmod(abs(seconds), 60)
    hours, minutes = divmod(int(minutes), 60)
    parts = [(hours, "h"), (minutes, "m"), (round(rest, 9), "s")]
    return sign + ("".join(f"{value:g}{unit}" for value, unit in parts if value) or "0s")
