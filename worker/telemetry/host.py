"""How busy the host is, from /proc/stat and /proc/meminfo (proc(5))."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

_SHORTEST_WINDOW = 1.0
"""Seconds: below, a few clock ticks decide the figure, so the last one is given again."""


def parse_cpu(text: str) -> tuple[int, int] | None:
    """Busy and total ticks of all CPUs since boot, from the text of /proc/stat."""
    for line in text.splitlines():
        name, *ticks = line.split()
        if name == "cpu" and len(ticks) >= 4 and all(tick.isdecimal() for tick in ticks):
            # user nice system idle iowait irq softirq steal; guest time is within user
            counts = [int(tick) for tick in ticks[:8]]
            idle = sum(counts[3:5])
            return sum(counts) - idle, sum(counts)
    return None


def parse_meminfo(text: str) -> dict[str, int]:
    """The sizes in /proc/meminfo, in bytes."""
    sizes: dict[str, int] = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[0].isdecimal() and words[1] == "kB":
            sizes[name] = int(words[0]) * 1024
    return sizes


class HostUsage:
    """Reads the host's counters when asked; None where they cannot be read."""

    def __init__(
        self, proc: Path = Path("/proc"), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._proc = proc
        self._clock = clock
        self._lock = threading.Lock()
        self._ticks = parse_cpu(self._text("stat"))
        self._taken = clock()
        self._percent: float | None = None

    def cpu_percent(self) -> float | None:
        """0 to 100 over all CPUs, since the last call that is at least a second ago."""
        with self._lock:
            now = self._clock()
            if self._percent is not None and now - self._taken < _SHORTEST_WINDOW:
                return self._percent
            ticks = parse_cpu(self._text("stat"))
            if ticks is None or self._ticks is None:
                self._ticks = ticks
                return None
            busy, total = ticks[0] - self._ticks[0], ticks[1] - self._ticks[1]
            # iowait may run backwards (proc(5)), so busy may too
            percent = min(100.0, max(0.0, 100.0 * busy / total)) if total > 0 else 0.0
            self._ticks, self._taken, self._percent = ticks, now, percent
            return percent

    def memory_used_bytes(self) -> int | None:
        """What programs hold: all but MemAvailable."""
        sizes = parse_meminfo(self._text("meminfo"))
        if "MemTotal" not in sizes or "MemAvailable" not in sizes:
            return None
        return sizes["MemTotal"] - sizes["MemAvailable"]

    def _text(self, name: str) -> str:
        try:
            return (self._proc / name).read_text(encoding="ascii", errors="replace")
        except OSError:
            return ""
