"""Reading counters where each layout of cgroups has them."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from worker.systemd.cgroup import CgroupMeter, read_lines, read_text
from worker.systemd.usage import CGROUP_ROOT, Usage, parse_record

WHO = ("some", "full")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def pressure(total: int) -> str:
    return "".join(f"{who} avg10=0.00 avg60=0.00 avg300=0.00 total={total}\n" for who in WHO)


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are opened from now on."""
    names: list[str] = []
    open_file = os.open

    def note(path: str, flags: int) -> int:
        names.append(Path(path).name)
        return open_file(path, flags)

    monkeypatch.setattr(os, "open", note)
    return names


V2 = {
    "cgroup.controllers": "cpu memory",
    "proc/pressure/cpu": pressure(7),
    "a/b/cpu.stat": "usage_usec 1500000\nuser_usec 1\n",
    "a/b/memory.peak": "100\n",
    "a/b/memory.current": "70\n",
    "a/b/memory.events": "oom 0\noom_kill 0\n",
    "a/b/io.stat": "",
    "a/b/pids.events": "max 1\n",
    "a/b/cpu.pressure": pressure(2_500_000),
    "a/b/memory.pressure": pressure(500),
    "a/b/io.pressure": pressure(0),
}
HYBRID = {
    "proc/pressure/cpu": pressure(7),
    "unified/cgroup.controllers": "",
    "unified/a/cpu.stat": "usage_usec 2000000\n",
    "unified/a/cpu.pressure": pressure(1_000_000),
    "unified/a/memory.pressure": pressure(0),
    "unified/a/io.pressure": pressure(30_000),
    "memory/a/memory.max_usage_in_bytes": "5\n",
    "memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
    "memory/a/memory.failcnt": "9\n",
    "blkio/a/blkio.throttle.io_service_bytes_recursive": "8:0 Read 4\nTotal 4\n",
    "pids/a/pids.events": "max 0\n",
    "proc/7/io": "rchar: 10\nwchar: 20\nread_bytes: 0\nwrite_bytes: 0\n",
}


def test_v2(tmp_path: Path) -> None:
    write(tmp_path, V2)
    meter = CgroupMeter(tmp_path, tmp_path / "proc")
    assert meter.sample("/a/b") == Usage(1.5, 100, None, None, 0, 0, 1, 2.5, 0.0005, 0.0)


def test_v2_before_the_kernel_kept_the_peak(tmp_path: Path) -> None:
    write(tmp_path, V2)
    (tmp_path / "a/b/memory.peak").unlink()
    meter = CgroupMeter(tmp_path, tmp_path / "proc")
    assert meter.sample("/a/b").memory_peak_bytes == 70
    assert f"{tmp_path}/a/b/memory.current" not in meter.record_files("/a/b")


def test_hybrid(tmp_path: Path) -> None:
    write(tmp_path, HYBRID)
    meter = CgroupMeter(tmp_path, tmp_path / "proc")
    assert meter.sample("/a", 7) == Usage(2.0, 5, 10, 20, 3, 9, 0, 1.0, 0.0, 0.03)
    assert meter.sample("/a") == Usage(2.0, 5, 4, None, 3, 9, 0, 1.0, 0.0, 0.03)


def test_v1(tmp_path: Path) -> None:
    write(tmp_path, {"cpuacct/a/cpuacct.usage": "2500000000\n", "pressure/cpu": pressure(7)})
    meter = CgroupMeter(tmp_path, tmp_path)
    assert meter.sample("/a") == Usage(cpu_seconds=2.5)


@pytest.mark.parametrize(("files", "group"), [(V2, "/a/b"), (HYBRID, "/a")])
def test_what_is_sampled_is_what_is_recorded_and_no_file_is_tried_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], group: str
) -> None:
    write(tmp_path, files)
    meter = CgroupMeter(tmp_path, tmp_path / "proc")
    recorded = meter.record_files(group)
    assert all(Path(path).exists() for path in recorded)
    names = opened(monkeypatch)
    meter.sample(group)
    assert names == [Path(path).name for path in recorded]


@pytest.mark.parametrize(("files", "group"), [(V2, "/a/b"), (HYBRID, "/a")])
def test_a_kernel_without_pressure_is_not_asked_for_it(
    tmp_path: Path, files: dict[str, str], group: str
) -> None:
    write(tmp_path, {name: text for name, text in files.items() if "pressure" not in name})
    meter = CgroupMeter(tmp_path, tmp_path / "proc")
    assert not [path for path in meter.record_files(group) if path.endswith(".pressure")]
    usage = meter.sample(group)
    assert usage.cpu_seconds is not None
    assert (usage.cpu_stall_seconds, usage.io_stall_seconds) == (None, None)


@pytest.mark.parametrize(("files", "group"), [(V2, "/a/b"), (HYBRID, "/a")])
def test_a_record_says_the_same_as_a_sample(
    tmp_path: Path, files: dict[str, str], group: str
) -> None:
    write(tmp_path, files)
    meter = CgroupMeter(tmp_path, tmp_path / "proc")
    grep = ["grep", "-sH", ".", *meter.record_files(group), "/nonexistent"]
    record = subprocess.run(grep, capture_output=True, text=True)
    assert record.stderr == ""
    text = record.stdout.replace(str(tmp_path), CGROUP_ROOT)
    paths = [path.replace(str(tmp_path), CGROUP_ROOT) for path in meter.record_files(group)]
    assert parse_record(text, paths) == meter.sample(group)


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
    assert parse_record(f"frame=12{record}", [path]).oom_kills == 2
    assert parse_record(f"frame=12{record}", [path]) == parse_record(record, [path])


def test_gone(tmp_path: Path) -> None:
    meter = CgroupMeter(tmp_path, tmp_path)
    assert meter.sample("/a", 7) == Usage()
    assert meter.sample("", 0) == Usage()


@pytest.mark.parametrize(
    "code", [errno.ENOENT, errno.ENODEV, errno.ESRCH, errno.EACCES, errno.EOPNOTSUPP]
)
def test_a_file_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_args: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", fail)
    assert read_text("/x") is None
    assert read_lines("/x") is None


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match="Input/output"):
        read_lines("/x")
