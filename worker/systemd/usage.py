"""What a unit used: the numbers, and how they are read from text. Pure.

Three sources give them, each with gaps: samples taken while the unit runs (cgroup.py), systemd's
own accounting, and the record: after a failure systemd runs ``grep -sH .`` over the counters of
the unit's cgroup and appends the lines to the unit's standard output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

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

    def merged(self, other: Usage) -> Usage:
        """The larger of each counter: all of them only grow."""
        values = {}
        for field in fields(self):
            known = [
                value
                for value in (getattr(self, field.name), getattr(other, field.name))
                if value is not None
            ]
            values[field.name] = max(known, default=None)
        return Usage(**values)


def parse_record(text: str) -> Usage:
    """The usage record in a unit's standard output; an empty Usage if there is none.

    Reads the first record: when a failed unit is stopped, the same command may run again, in a
    new and empty cgroup. Lines that are not of a record are skipped.
    """
    files: dict[str, list[str]] = {}
    seen: set[str] = set()
    for line in text.splitlines():
        path, colon, value = line.partition(":")
        if not colon or not path.startswith(f"{CGROUP_ROOT}/"):
            continue
        if line_key(path, value) in seen:
            break
        seen.add(line_key(path, value))
        files.setdefault(path, []).append(value)
    result = Usage()
    for path, lines in files.items():
        result = result.merged(parse_file(path, lines))
    return result


def line_key(path: str, line: str) -> str:
    """Names the counter a line is about, whatever its value."""
    words = line.split()
    # "254:0 Read 12" of blkio names its counter with two words, "254:0 rbytes=1 …" with one.
    names = words[:-1] if len(words) in (2, 3) and "=" not in line else words[:1]
    return " ".join([path, *([] if line.strip().isdigit() else names)])


def parse_file(path: str, lines: Iterable[str]) -> Usage:
    """One counter file of a cgroup, known by its name."""
    lines = list(lines)
    match path.rpartition("/")[2]:
        case "cpu.stat":
            usec = _table(lines).get("usage_usec")
            return Usage(cpu_seconds=None if usec is None else usec / 1e6)
        case "cpuacct.usage":
            nsec = _number(lines)
            return Usage(cpu_seconds=None if nsec is None else nsec / 1e9)
        case "memory.peak" | "memory.max_usage_in_bytes" | "memory.current":
            return Usage(memory_peak_bytes=_number(lines))
        case "memory.events":
            table = _table(lines)
            return Usage(oom_kills=table.get("oom_kill"), memory_limit_hits=table.get("oom"))
        case "memory.oom_control":
            return Usage(oom_kills=_table(lines).get("oom_kill"))
        case "memory.failcnt":
            return Usage(memory_limit_hits=_number(lines))
        case "pids.events":
            return Usage(task_limit_hits=_table(lines).get("max"))
        case "io.stat":
            return Usage(
                io_read_bytes=_io_stat(lines, "rbytes="), io_write_bytes=_io_stat(lines, "wbytes=")
            )
        case "blkio.throttle.io_service_bytes_recursive":
            return Usage(io_read_bytes=_blkio(lines, "Read"), io_write_bytes=_blkio(lines, "Write"))
        case "io":  # /proc/PID/io
            table = _table([line.replace(":", "") for line in lines])
            return Usage(
                io_read_bytes=_largest(table.get("rchar"), table.get("read_bytes")),
                io_write_bytes=_largest(table.get("wchar"), table.get("write_bytes")),
            )
    return Usage()


def _largest(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _number(lines: list[str]) -> int | None:
    """A file of one number; "max" means no limit and is no number."""
    text = lines[0].strip() if lines else ""
    return int(text) if text.isascii() and text.isdigit() else None


def _table(lines: list[str]) -> dict[str, int]:
    """A file of "name number" lines."""
    rows = (line.split() for line in lines)
    return {
        row[0]: int(row[1])
        for row in rows
        if len(row) == 2 and row[1].isascii() and row[1].isdigit()
    }


def _io_stat(lines: list[str], key: str) -> int | None:
    """Sum over devices of one field of "8:0 rbytes=1 wbytes=2 …"."""
    values = [
        int(word.removeprefix(key))
        for line in lines
        for word in line.split()
        if word.startswith(key) and word.removeprefix(key).isdecimal()
    ]
    return sum(values) if values else None


def _blkio(lines: list[str], operation: str) -> int | None:
    """Sum over devices of the lines "8:0 Read 1"."""
    rows = [line.split() for line in lines]
    values = [
        int(row[2]) for row in rows if len(row) == 3 and row[1] == operation and row[2].isdecimal()
    ]
    return sum(values) if values else None
