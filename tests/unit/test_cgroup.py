"""Reading counters where each layout of cgroups has them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from worker.systemd.cgroup import CgroupMeter, read_lines
from worker.systemd.usage import CGROUP_ROOT, Usage, parse_record


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_v2(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "cgroup.controllers": "cpu memory",
            "a/b/cpu.stat": "usage_usec 1500000\n",
            "a/b/memory.peak": "100\n",
            "a/b/memory.current": "70\n",
            "a/b/memory.events": "oom 0\noom_kill 0\n",
            "a/b/io.stat": "",
            "a/b/pids.events": "max 1\n",
        },
    )
    meter = CgroupMeter(tmp_path, tmp_path / "proc")
    assert meter.sample("/a/b") == Usage(1.5, 100, None, None, 0, 0, 1)
    (tmp_path / "a/b/memory.peak").unlink()
    assert meter.sample("/a/b").memory_peak_bytes == 70
    assert f"{tmp_path}/a/b/memory.events" in meter.record_files("/a/b")
    assert f"{tmp_path}/a/b/memory.current" not in meter.record_files("/a/b")


def test_hybrid_with_cpu_and_cpuacct_apart(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "unified/a/cpu.stat": "usage_usec 2000000\n",
            "memory/a/memory.max_usage_in_bytes": "5\n",
            "memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
            "memory/a/memory.failcnt": "9\n",
            "blkio/a/blkio.throttle.io_service_bytes_recursive": "8:0 Read 4\nTotal 4\n",
            "pids/a/pids.events": "max 0\n",
            "proc/7/io": "rchar: 10\nwchar: 20\nread_bytes: 0\nwrite_bytes: 0\n",
        },
    )
    meter = CgroupMeter(tmp_path, tmp_path / "proc")
    assert meter.sample("/a", 7) == Usage(2.0, 5, 10, 20, 3, 9, 0)
    assert meter.sample("/a") == Usage(2.0, 5, 4, None, 3, 9, 0)


def test_v1_with_cpu_and_cpuacct_joined(tmp_path: Path) -> None:
    write(tmp_path, {"cpuacct/a/cpuacct.usage": "2500000000\n"})
    assert CgroupMeter(tmp_path, tmp_path).sample("/a").cpu_seconds == 2.5


@pytest.mark.parametrize(
    ("layout", "first", "lost"),
    [
        ("cgroup.controllers", "memory.events", "low 0\noom 1\noom_kill 2\n"),
        ("memory/x", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
    ],
)
def test_a_record_after_a_line_without_end_loses_nothing(
    tmp_path: Path, layout: str, first: str, lost: str
) -> None:
    write(tmp_path, {layout: ""})
    path = CgroupMeter(tmp_path, tmp_path).record_files("/a")[0]
    assert path.endswith(f"/a/{first}")
    path = path.replace(str(tmp_path), CGROUP_ROOT)
    record = "".join(f"{path}:{line}\n" for line in lost.splitlines())
    assert parse_record(f"frame=12{record}").oom_kills == 2
    assert parse_record(f"frame=12{record}") == parse_record(record)


def test_gone(tmp_path: Path) -> None:
    meter = CgroupMeter(tmp_path, tmp_path)
    assert meter.sample("/a", 7) == Usage()
    assert meter.sample("", 0) == Usage()


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENODEV, errno.ESRCH, errno.EACCES])
def test_a_file_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_args: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", fail)
    assert read_lines("/x") is None


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match="Input/output"):
        read_lines("/x")
