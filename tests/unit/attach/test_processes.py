"""What the kernel's files say of processes, and of the limits they have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.unit.attach.proc import Proc
from worker.systemd.processes import InForce, Processes, limits_in_force, parse_stat


def pids(look: Processes, pid: int) -> list[int]:
    return sorted(member.pid for member in look.family(pid))


# processes


def test_a_line_of_stat_with_an_odd_name() -> None:
    line = "7 (a) R 1\x1b) S 3 7 7 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 4711 0 0"
    process = parse_stat(line)
    assert (process.pid, process.parent, process.started) == (7, 3, 4711)
    assert process.name == "a) R 1?"
    assert not process.ended
    assert not process.kernel


def test_a_family(proc: Proc, look: Processes) -> None:
    assert look.family(10)[0].pid == 10
    assert pids(look, 10) == [10, 11, 12]
    assert pids(look, 12) == [12]
    assert look.family(99) == []
    proc.add(11, 10, state="Z")
    assert pids(look, 10) == [10, 12]  # not yet given to another parent
    assert look.family(11) == []


def test_what_is_known_of_a_process(look: Processes) -> None:
    assert look.anonymous_bytes(10) == 2 << 20
    assert look.anonymous_bytes(99) == 0
    assert look.unit(10) == "other.service"
    assert look.unit(1) == "init.scope"
    assert look.unit(99) == ""


@pytest.mark.parametrize(
    ("lines", "unit"),
    [
        ("0::/a.slice/x.scope\n", "x.scope"),
        ("3:cpu,cpuacct:/\n1:name=systemd:/a.slice/x.service/inner\n0::/\n", "x.service"),
        ("1:name=systemd:/docker/1234\n", ""),
        ("0::/user.slice/user@7.service/app.slice/x.scope\n", "x.scope"),
        ("0::/\n", ""),
    ],
)
def test_the_unit_of_a_process(proc: Proc, look: Processes, lines: str, unit: str) -> None:
    (proc.folder / "10/cgroup").write_text(lines)
    assert look.unit(10) == unit


# limits in force

UNIT = "ffmpeg-job-attached-7.scope"


def write(folder: Path, contents: Mapping[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in contents.items():
        (folder / name).write_text(f"{text}\n")


def test_in_force_on_v2(tmp_path: Path) -> None:
    limits = {"cpu.max": "25000 50000", "memory.max": "67108864", "memory.swap.max": "0"}
    write(tmp_path / "a.slice" / UNIT, limits)
    found = limits_in_force(UNIT, {"": f"/a.slice/{UNIT}"}, tmp_path)
    assert found == InForce(50.0, 64 << 20, 0)


def test_nothing_in_force_on_v2(tmp_path: Path) -> None:
    write(tmp_path / UNIT, {"cpu.max": "max 100000", "memory.max": "max"})
    write(tmp_path / "x", {"cpu.max": "1 1"})
    assert limits_in_force(UNIT, {"": f"/{UNIT}"}, tmp_path) == InForce()
    assert limits_in_force(UNIT, {"": "/x"}, tmp_path) == InForce()
    assert limits_in_force(UNIT, {}, tmp_path) == InForce()


def test_in_force_on_v1(tmp_path: Path) -> None:
    cpu = {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"}
    write(tmp_path / "cpu/s" / UNIT, cpu)
    write(tmp_path / "memory/s" / UNIT, {"memory.limit_in_bytes": "67108864"})
    place = f"/s/{UNIT}"
    cgroups = {"cpu": place, "cpuacct": "/", "memory": place, "name=systemd": place, "": place}
    assert limits_in_force(UNIT, cgroups, tmp_path) == InForce(150.0, 64 << 20, None)
    assert limits_in_force(UNIT, {**cgroups, "cpu": "/s"}, tmp_path).cpu_percent is None


def test_nothing_in_force_on_v1(tmp_path: Path) -> None:
    cpu = {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}
    write(tmp_path / "cpu" / UNIT, cpu)
    write(tmp_path / "memory" / UNIT, {"memory.limit_in_bytes": "9223372036854771712"})
    cgroups = {"cpu": f"/{UNIT}", "memory": f"/{UNIT}"}
    assert limits_in_force(UNIT, cgroups, tmp_path) == InForce()
