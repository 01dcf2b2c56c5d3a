"""What a unit used: the numbers, and how they are read from text. Pure.

Three sources give them, each with gaps: samples taken while the unit runs (cgroup.py), systemd's
own accounting, and the record: after a failure systemd runs ``grep -sH .`` over the counters of
the unit's cgroup and appends the lines to the unit's standard output.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

CGROUP_ROOT = "/sys/fs/cgroup"


@dataclass(frozen=True, slots=True)
class Usage:
    """Counters of one unit; None where nothing is known."""

    cpu_seconds: float | None = None
    memory_peak_bytes: int | None = None
    """The kernel's own maximum; where there is none (cgroup v2 before Linux 5.19), the largest
    sample. Includes page cache."""
    io_read_bytes: int | None = None
    """The larger of two figures: what block devices delivered for the cgroup, and what the main
    process got from read calls (rchar of proc(5)), page cache and pipes included."""
    io_write_bytes: int | None = None
    """Likewise, of writes (wchar). cgroup v1 misses buffered writes, so that there the second
    figure is the true one."""
    oom_kills: int | None = None
    """Processes of the unit killed for lack of memory, its own limit's or the machine's."""
    memory_limit_hits: int | None = None
    """v2: how often the unit's own limit left only killing ("oom" of memory.events).
    v1: how often it was touched at all, which reclaiming page cache does too."""
    task_limit_hits: int | None = None
    """Forks refused by TasksMax."""
    cpu_stall_seconds: float | None = None
    """How long some thread of the unit was ready to run and had to wait for a CPU; the time that
    its own CPUQuota held it back counts. This and the next two are "some" of the kernel's
    pressure stall information (Documentation/accounting/psi.rst): for each CPU the time in which
    at least one thread waited, averaged over the CPUs that the unit used."""
    memory_stall_seconds: float | None = None
    """How long some thread waited for memory: reclaim, swap, pages read back in."""
    io_stall_seconds: float | None = None
    """How long some thread waited for a block device."""

    def merged(self, other: Usage) -> Usage:
        """The larger of each counter: all of them only grow."""
        return Usage(*(_larger(getattr(self, name), getattr(other, name)) for name in _NAMES))


_NAMES = tuple(field.name for field in fields(Usage))


def _larger(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)


@dataclass(frozen=True, slots=True)
class _Counter:
    """Where a file has a counter: the sum of what the pattern matches, over ``unit``."""

    name: str
    """The field of Usage."""
    pattern: re.Pattern[str]
    unit: float | None = None
    """How many of what the kernel counts make a second; None for plain numbers."""


def _counter(name: str, pattern: str, unit: float | None = None) -> _Counter:
    """``#`` stands for the number: a kernel counter has 64 bits."""
    number = pattern.replace("#", r"(\d{1,20})")
    return _Counter(name, re.compile(number, re.ASCII | re.MULTILINE), unit)


# No match is "not known": "max" is no number, and a device without I/O has no line.
_NUMBER = "^#$"
_STALLED = r"^some .*\btotal=#$"
_FILES = {
    "cpu.stat": [_counter("cpu_seconds", "^usage_usec #$", 1e6)],
    "cpuacct.usage": [_counter("cpu_seconds", _NUMBER, 1e9)],
    "memory.peak": [_counter("memory_peak_bytes", _NUMBER)],
    "memory.current": [_counter("memory_peak_bytes", _NUMBER)],
    "memory.max_usage_in_bytes": [_counter("memory_peak_bytes", _NUMBER)],
    "memory.events": [
        _counter("oom_kills", "^oom_kill #$"),
        _counter("memory_limit_hits", "^oom #$"),
    ],
    "memory.oom_control": [_counter("oom_kills", "^oom_kill #$")],
    "memory.failcnt": [_counter("memory_limit_hits", _NUMBER)],
    "pids.events": [_counter("task_limit_hits", "^max #$")],
    "io.stat": [  # "8:0 rbytes=1 wbytes=2 …", a line for each device
        _counter("io_read_bytes", r"\brbytes=#\b"),
        _counter("io_write_bytes", r"\bwbytes=#\b"),
    ],
    "blkio.throttle.io_service_bytes_recursive": [  # "8:0 Read 1", likewise
        _counter("io_read_bytes", r"^\S+ Read #$"),
        _counter("io_write_bytes", r"^\S+ Write #$"),
    ],
    "io": [  # /proc/PID/io
        _counter("io_read_bytes", "^rchar: #$"),
        _counter("io_read_bytes", "^read_bytes: #$"),
        _counter("io_write_bytes", "^wchar: #$"),
        _counter("io_write_bytes", "^write_bytes: #$"),
    ],
    "cpu.pressure": [_counter("cpu_stall_seconds", _STALLED, 1e6)],
    "memory.pressure": [_counter("memory_stall_seconds", _STALLED, 1e6)],
    "io.pressure": [_counter("io_stall_seconds", _STALLED, 1e6)],
}


def parse_files(files: Iterable[tuple[str, str]]) -> Usage:
    """Usage from counter files, each given as its name and its text.

    Where several count the same, the larger is taken. Files of other names count nothing.
    """
    found: dict[str, Any] = {}
    for name, text in files:
        for counter in _FILES.get(name, ()):
            if numbers := counter.pattern.findall(text):
                total = sum(map(int, numbers))
                value = total / counter.unit if counter.unit else total
                found[counter.name] = _larger(found.get(counter.name), value)
    return Usage(**found)


def parse_record(text: str, record_files: Sequence[str]) -> Usage:
    """The usage record at the end of a unit's standard output; an empty Usage if there is none.

    ``record_files`` are the files that it was made of, in their order. What stands above them was
    written by the unit itself, which may have written what looks like a record: so this reads
    from the end, and no further than to the first line of the first file.
    """
    order = {path: place for place, path in enumerate(record_files)}
    files: dict[str, list[str]] = {}
    seen: set[str] = set()
    place = len(order)
    for line in reversed(text.splitlines()):
        path, _, value = line.partition(":")
        key = line_key(path, value)
        if order.get(path, len(order)) > place or path not in order or key in seen:
            break
        place = order[path]
        seen.add(key)
        files.setdefault(path, []).append(value)
    return parse_files((path.rpartition("/")[2], "\n".join(lines)) for path, lines in files.items())


def line_key(path: str, line: str) -> str:
    """Names the counter a line is about, whatever its value."""
    words = line.split()
    # "254:0 Read 12" of blkio names its counter with two words, "254:0 rbytes=1 …" with one.
    names = words[:-1] if len(words) in (2, 3) and "=" not in line else words[:1]
    return " ".join([path, *([] if line.strip().isdigit() else names)])
