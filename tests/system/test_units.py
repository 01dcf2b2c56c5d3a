"""The units that are shipped, as this systemd reads them: each version knows other settings."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "units"
RUN = Path("/run/systemd/system")
CGROUPS = Path("/sys/fs/cgroup")
JOBS = "ffmpeg.slice"
PROBE = "ffmpeg-worker-units-test.service"


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_shipped_units_are_understood(tmp_path: Path) -> None:
    copies = [tmp_path / unit.name for unit in UNITS.glob("*.s*ice")]
    for copy in copies:
        text = (UNITS / copy.name).read_text()
        copy.write_text(text.replace("/usr/local/bin/ffmpeg-worker", "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", *map(str, copies)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


@pytest.fixture
def slices() -> Iterator[None]:
    """The slices as they are shipped, with a process in one of them."""
    RUN.mkdir(exist_ok=True)
    copies = [RUN / unit.name for unit in UNITS.glob("*.slice")]
    for copy in copies:
        copy.write_text((UNITS / copy.name).read_text())
    run("systemctl", "daemon-reload")
    run("systemd-run", "--unit", PROBE, "--slice", "ffmpeg-batch.slice", "sleep", "1000")
    yield
    run("systemctl", "stop", PROBE, JOBS)
    # What `set-property --runtime` has left.
    run("systemctl", "revert", JOBS)
    for copy in copies:
        copy.unlink(missing_ok=True)
    run("systemctl", "daemon-reload")


def memory_of_the_machine() -> int:
    line = Path("/proc/meminfo").read_text().splitlines()[0]
    return int(line.split()[1]) * 1024


def kernels(controller: str, on_v1: str, on_v2: str) -> str:
    """What the kernel has in force for all jobs together."""
    if (CGROUPS / "cgroup.controllers").exists():
        return (CGROUPS / JOBS / on_v2).read_text().strip()
    return (CGROUPS / controller / JOBS / on_v1).read_text().strip()


def memory_ceiling() -> int:
    return int(kernels("memory", "memory.limit_in_bytes", "memory.max"))


@pytest.mark.usefixtures("slices")
def test_jobs_together_leave_room_for_the_host() -> None:
    share = memory_ceiling() / memory_of_the_machine()
    # Less where what systemd runs in has a limit of its own: the percents are of that then.
    assert 0 < share < 0.86
    tasks = kernels("pids", "pids.max", "pids.max")
    assert 512 < int(tasks) < int(Path("/proc/sys/kernel/threads-max").read_text())


@pytest.mark.usefixtures("slices")
def test_services_of_the_host_go_before_jobs() -> None:
    jobs = int(kernels("cpu", "cpu.shares", "cpu.weight"))
    usual = 100 if (CGROUPS / "cgroup.controllers").exists() else 1024
    assert jobs == usual // 2


@pytest.mark.usefixtures("slices")
def test_the_ceiling_can_be_set_by_command() -> None:
    run("systemctl", "set-property", "--runtime", JOBS, "MemoryMax=1G", "CPUQuota=150%")
    assert memory_ceiling() == 1 << 30
    assert run("systemctl", "show", JOBS, "-p", "CPUQuotaPerSecUSec", "--value") == "1.500000s\n"


def test_the_agent_is_as_closed_in_as_it_can_be() -> None:
    """0 is closed, 100 open, systemd-analyze(1); versions differ a little in what they count."""
    run(
        *("systemd-analyze", "security", "--offline=yes", "--threshold=25"),
        UNITS / "ffmpeg-worker.service",
    )
