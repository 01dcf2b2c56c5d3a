"""What runs in a bed. Needs root and is run on purpose: `pytest tests/bed`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bed_enter
from bed import PROJECT, Bed


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with Bed() as made:
        yield made


def _output(bed: Bed, *command: str) -> str:
    result = bed.run(command, capture_output=True, text=True, check=True)
    return str(result.stdout).strip()


# --- a systemd that works -----------------------------------------------------------------------


def test_systemd_runs_as_pid_1_and_nothing_failed(bed: Bed) -> None:
    assert _output(bed, "systemctl", "is-system-running") == "running"
    assert _output(bed, "cat", "/proc/1/comm") == "systemd"


def test_bus_is_reachable_from_the_host(bed: Bed) -> None:
    command = ["busctl", f"--address={bed.bus_address}", "get-property"]
    name, path = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
    command += [name, path, f"{name}.Manager", "SystemState"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == 's "running"\n'


def test_memory_limit_is_enforced(bed: Bed) -> None:
    command = ["systemd-run", "--quiet", "--wait", "--property=MemoryMax=64M"]
    command += ["--property=MemorySwapMax=0", "/usr/bin/python3", "-c"]
    assert bed.run([*command, "bytearray(16 << 20)"]).returncode == 0
    assert bed.run([*command, "bytearray(200 << 20)"]).returncode != 0


def test_cpu_quota_reaches_the_kernel(bed: Bed) -> None:
    bed.run(["systemd-run", "--unit=quota", "--property=CPUQuota=50%", "sleep", "60"], check=True)
    group = _output(bed, "systemctl", "show", "--property=ControlGroup", "--value", "quota")
    script = f"cat /sys/fs/cgroup/cpu{group}/cpu.cfs_quota_us || cat /sys/fs/cgroup{group}/cpu.max"
    assert _output(bed, "sh", "-c", script).split()[0] == "50000"
    bed.run(["systemctl", "stop", "quota"], check=True)


def test_operators_tools_work(bed: Bed) -> None:
    bed.run(["systemd-run", "--wait", "--unit=talks", "echo", "said in the bed"], check=True)
    assert "said in the bed" in _output(bed, "journalctl", "--unit=talks")
    assert "init.scope" in _output(bed, "systemd-cgtop", "--batch", "--iterations=1")
    assert "UNSAFE" in _output(bed, "systemd-analyze", "security", "dbus.service")


def test_shared_kernel_is_out_of_reach(bed: Bed) -> None:
    assert bed.run(["date", "--set=@0"], capture_output=True).returncode != 0
    assert bed.run(["sh", "-c", "echo 0 >/proc/sys/vm/swappiness"], stderr=DEVNULL).returncode != 0
    unit = ["systemd-run", "--quiet", "--wait", "date", "--set=@0"]
    assert bed.run(unit).returncode != 0
    assert time.time() > 1_000_000


# --- commands in it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "status"), [("exit 7", 7), ("exit 0", 0), ("kill -9 $$", 137), ("kill $$", 143)]
)
def test_exit_status_is_passed_on(bed: Bed, script: str, status: int) -> None:
    assert bed.run(["sh", "-c", script]).returncode == status


def test_command_that_is_not_there_is_said_as_by_a_shell(bed: Bed) -> None:
    result = bed.run(["no-such-command"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (
        127,
        "bed: no-such-command: No such file or directory\n",
    )


def test_stdin_stdout_and_stderr_are_passed_on(bed: Bed) -> None:
    result = bed.run(["sh", "-c", "cat; echo e >&2"], input="in", capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("in", "e\n")


def test_signal_reaches_the_command(bed: Bed) -> None:
    script = "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.01; done"
    with bed.popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.read() == "bye\n"
        assert process.wait(10) == 3


def test_killed_command_is_gone_inside(bed: Bed) -> None:
    with bed.popen(["sh", "-c", "echo up; exec sleep 97531"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()
        assert process.stdout.read() == b""  # its end of the pipe is closed: it has ended


def test_command_can_be_killed_and_buried_at_once(bed: Bed) -> None:
    script = "trap '' TERM; echo $$; while :; do sleep 0.01; done"
    with bed.popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = process.stdout.readline().strip()
        process.send_signal(bed_enter.KILL)
        assert process.wait(10) == 137
    assert bed.run(["test", "-e", f"/proc/{pid}"]).returncode == 1


def test_command_that_takes_too_long_is_ended(bed: Bed) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        bed.run(["sleep", "60"], timeout=0.2)


def test_environment_is_clean(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nowhere")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.invalid/")
    result = bed.run(["env"], env={"ADDED": "1"}, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert {"FFMPEG_WORKER_BED=1", "ADDED=1", "PIP_INDEX_URL=https://index.invalid/"} <= set(lines)
    assert not [line for line in lines if line.startswith("DBUS_")]


def test_working_folder(bed: Bed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _output(bed, "pwd") == str(Path.cwd())
    assert bed.run(["pwd"], cwd="/etc", capture_output=True).stdout == b"/etc\n"
    assert bed.run(["pwd"], cwd="/no/such", capture_output=True).returncode == 125
    monkeypatch.chdir(tmp_path)  # below /tmp, which is another one inside
    assert _output(bed, "pwd") == "/"


def test_project_is_seen_as_it_is_and_cannot_be_written(bed: Bed) -> None:
    fresh = PROJECT / f".bed-test-{os.getpid()}"
    try:
        fresh.write_text("one")
        assert _output(bed, "cat", str(fresh)) == "one"
        fresh.write_text("two")
        assert _output(bed, "cat", str(fresh)) == "two"
        assert bed.run(["touch", str(fresh)], capture_output=True).returncode != 0
    finally:
        fresh.unlink(missing_ok=True)


def test_what_is_written_inside_stays_inside(bed: Bed) -> None:
    bed.run(
        ["sh", "-c", "echo x | tee /etc/of-the-bed /tmp/of-the-bed"], stdout=DEVNULL, check=True
    )
    assert not Path("/etc/of-the-bed").exists()
    assert not Path("/tmp/of-the-bed").exists()
