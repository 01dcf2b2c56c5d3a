"""Counters from text."""

from __future__ import annotations

import re

import pytest

from worker.systemd.usage import Usage, parse_files, parse_record

V1 = """\
frame=100
progress=end
/sys/fs/cgroup/unified/a/cpu.stat:usage_usec 33290
/sys/fs/cgroup/unified/a/cpu.stat:user_usec 11091
/sys/fs/cgroup/unified/a/cpu.stat:system_usec 22198
/sys/fs/cgroup/memory/a/memory.max_usage_in_bytes:31457280
/sys/fs/cgroup/memory/a/memory.oom_control:oom_kill_disable 0
/sys/fs/cgroup/memory/a/memory.oom_control:under_oom 0
/sys/fs/cgroup/memory/a/memory.oom_control:oom_kill 1
/sys/fs/cgroup/memory/a/memory.failcnt:103
/sys/fs/cgroup/blkio/a/blkio.throttle.io_service_bytes_recursive:254:0 Read 4096
/sys/fs/cgroup/blkio/a/blkio.throttle.io_service_bytes_recursive:254:0 Write 100
/sys/fs/cgroup/blkio/a/blkio.throttle.io_service_bytes_recursive:254:0 Total 4196
/sys/fs/cgroup/blkio/a/blkio.throttle.io_service_bytes_recursive:254:16 Read 4
/sys/fs/cgroup/blkio/a/blkio.throttle.io_service_bytes_recursive:254:16 Write 0
/sys/fs/cgroup/blkio/a/blkio.throttle.io_service_bytes_recursive:Total 4200
/sys/fs/cgroup/pids/a/pids.events:max 2
/sys/fs/cgroup/unified/a/cpu.pressure:some avg10=0.00 avg60=0.00 avg300=0.00 total=18091
"""
V2 = """\
/sys/fs/cgroup/a/cpu.stat:usage_usec 2500000
/sys/fs/cgroup/a/cpu.stat:nr_periods 0
/sys/fs/cgroup/a/memory.peak:1048576
/sys/fs/cgroup/a/memory.events:low 0
/sys/fs/cgroup/a/memory.events:max 12
/sys/fs/cgroup/a/memory.events:oom 1
/sys/fs/cgroup/a/memory.events:oom_kill 2
/sys/fs/cgroup/a/io.stat:254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0
/sys/fs/cgroup/a/io.stat:8:0 rbytes=1 wbytes=2 rios=1 wios=2 dbytes=0 dios=0
/sys/fs/cgroup/a/pids.events:max 0
/sys/fs/cgroup/a/cpu.pressure:some avg10=12.49 avg60=2.25 avg300=0.47 total=1448580
/sys/fs/cgroup/a/cpu.pressure:full avg10=12.49 avg60=2.25 avg300=0.47 total=1448579
/sys/fs/cgroup/a/memory.pressure:some avg10=0.00 avg60=0.00 avg300=0.00 total=500
/sys/fs/cgroup/a/memory.pressure:full avg10=0.00 avg60=0.00 avg300=0.00 total=400
/sys/fs/cgroup/a/io.pressure:some avg10=0.00 avg60=0.00 avg300=0.00 total=0
/sys/fs/cgroup/a/io.pressure:full avg10=0.00 avg60=0.00 avg300=0.00 total=0
"""
V1_USAGE = Usage(0.03329, 31457280, 4100, 100, 1, 103, 2, 0.018091)
V2_USAGE = Usage(2.5, 1048576, 11, 22, 2, 1, 0, 1.44858, 0.0005, 0.0)


def files_of(text: str) -> list[str]:
    paths = (line.partition(":")[0] for line in text.splitlines() if line.startswith("/"))
    return list(dict.fromkeys(paths))


def record_of(text: str) -> Usage:
    return parse_record(text, files_of(text))


PATHS = ["/etc/passwd", "/sys/fs/cgroup/a/cpu.stat", "/sys/fs/cgroup/a/memory.peak"]


@pytest.mark.parametrize(("text", "expected"), [(V1, V1_USAGE), (V2, V2_USAGE), ("", Usage())])
def test_a_record(text: str, expected: Usage) -> None:
    assert record_of(text) == expected


@pytest.mark.parametrize("text", [V1, V2])
def test_what_the_job_wrote_before_is_none_of_the_record(text: str) -> None:
    lines = [line for line in text.splitlines() if line.startswith("/")]
    # Larger figures, so that they cannot but be noticed if they are read.
    forged = "\n".join(re.sub(r"\d+$", "99999999999", line) for line in lines) + "\n"
    record = "".join(f"{line}\n" for line in lines)
    assert record_of(forged + record) == record_of(text)
    last = f"{files_of(text)[-1]}:max 99999999999\n"
    other = "/sys/fs/cgroup/b/memory.peak:99999999999\n"
    assert record_of(forged + last + other + record) == record_of(text)


@pytest.mark.parametrize(
    "text",
    [
        "frame=1:2\n/etc/passwd:root 1\n",
        "/sys/fs/cgroup/a/cpu.stat\n",
        "/sys/fs/cgroup/a/cpu.stat:usage_usec many\n",
        "/sys/fs/cgroup/a/memory.peak:max\n",
        "/sys/fs/cgroup/a/memory.peak:\n",
        "/sys/fs/cgroup/a/memory.peak:\u0663\n",
        f"/sys/fs/cgroup/a/memory.peak:{'9' * 5000}\n",
        "/sys/fs/cgroup/a/io.stat:8:0 rbytes=x\n",
        "/sys/fs/cgroup/a/cpu.pressure:full avg10=0.00 avg60=0.00 avg300=0.00 total=5\n",
        "/sys/fs/cgroup/a/cpu.pressure:some avg10=0.00 avg60=0.00 avg300=0.00 total=\n",
        "/sys/fs/cgroup/a/unheard.of:1\n",
    ],
)
def test_what_is_no_counter_counts_nothing(text: str) -> None:
    assert parse_record(text, PATHS) == Usage()


def test_what_a_process_says() -> None:
    text = "rchar: 100\nwchar: 5\nsyscr: 1\nread_bytes: 40\nwrite_bytes: 4096\n"
    text += "cancelled_write_bytes: 9999\n"
    usage = parse_files([("io", text)])
    assert (usage.io_read_bytes, usage.io_write_bytes) == (100, 4096)


def test_cpuacct() -> None:
    assert parse_files([("cpuacct.usage", "1500000000\n")]) == Usage(cpu_seconds=1.5)


def test_of_two_files_that_count_the_same_the_larger_figure_is_taken() -> None:
    one, other = ("io", "rchar: 100\n"), ("io.stat", "8:0 rbytes=7\n8:16 rbytes=94\n")
    expected = Usage(io_read_bytes=101)
    assert parse_files([one, other]) == parse_files([other, one]) == expected


def test_merging_takes_the_larger() -> None:
    one = Usage(cpu_seconds=1.0, oom_kills=0)
    other = Usage(cpu_seconds=2.0, memory_peak_bytes=5)
    merged = Usage(cpu_seconds=2.0, memory_peak_bytes=5, oom_kills=0)
    assert one.merged(other) == other.merged(one) == merged
