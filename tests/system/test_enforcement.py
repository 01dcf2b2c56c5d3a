"""Which limits hold, on a real systemd: the system's manager, and a lingering user's."""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lingering import User, lingering_user
from tests.slowness import SLOWNESS
from worker.systemd.enforcement import Limit, check
from worker.systemd.launcher import Launcher

V2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
VERSION = "cgroup v2" if V2 else "cgroup v1"
JOB = {"id": "rootless-1", "scenario": "test", "parameters": {"duration": 1, "codec": "h264"}}
HARD = {Limit.CPU, Limit.MEMORY, Limit.TASKS}


def sh(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        pytest.fail(f"{command} gave {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def units(*flags: str, pattern: str) -> list[str]:
    listed = sh("systemctl", *flags, "list-units", "--all", "--plain", "--no-legend", pattern)
    return [line.split()[0] for line in listed.splitlines()]


def cgroups(pattern: str) -> list[Path]:
    return list(Path("/sys/fs/cgroup").glob(f"**/{pattern}"))


@pytest.fixture(autouse=True)
def nothing_of_a_check_is_left() -> Iterator[None]:
    yield
    assert units(pattern="ffmpeg-limits-*") == []


async def test_the_systems_manager_enforces_limits_and_says_so(
    launcher: Launcher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = await check(launcher, user=False)
    assert found is not None
    assert set(found.holds) >= {*HARD, Limit.CPU_WEIGHT}
    assert found.place == f"{VERSION}, system manager"
    names = "CPU, memory, swap, tasks" if Limit.SWAP in found.holds else "CPU, memory, tasks"
    assert f"limits that the kernel enforces here: {names} ({found.place})" in caplog.text
    assert not HARD & set(found.missing)


async def test_a_check_takes_little_time_and_disturbs_no_sweep(launcher: Launcher) -> None:
    """The time is the best of many: others use this machine, too."""
    best = 60.0
    for _ in range(10):
        begun = time.monotonic()
        assert await check(launcher, user=False)
        best = min(best, time.monotonic() - begun)
        assert await launcher.leftovers() == []
    assert best < 0.05 * SLOWNESS


async def test_what_a_killed_worker_has_left_is_cleared_away(launcher: Launcher) -> None:
    left = "ffmpeg-limits-check-dead.service"
    sh("systemd-run", "--unit", left, "-p", "RemainAfterExit=yes", "-p", "Type=oneshot", "true")
    assert units(pattern="ffmpeg-limits-*") == [left]
    assert await check(launcher, user=False)
    assert units(pattern="ffmpeg-limits-*") == []


# a user with a manager of its own


@pytest.fixture(scope="module")
def user() -> Iterator[User]:
    with lingering_user("rootless") as user:
        job = user.home / "job.json"
        job.write_text(json.dumps(JOB), encoding="ascii")
        job.chmod(0o644)
        yield user


def test_a_job_completes_in_the_users_manager_which_says_what_holds(user: User) -> None:
    work_dir = user.home / "work"
    done = user.worker("run", "--user", "--work-dir", str(work_dir), "job.json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "completed"
    assert f"user@{user.uid}.service/ffmpeg.slice/" in done.stderr
    told = [line.partition("enforcement: ")[2] for line in done.stderr.splitlines()]
    if V2:
        # what systemd gives a user's manager by default
        assert any(
            line.startswith("limits that the kernel enforces here: CPU, memory, ")
            and "tasks (cgroup v2, user manager)" in line
            for line in told
        )
    else:
        assert "limits that the kernel enforces here: none (cgroup v1, user manager)" in told
        (missing,) = (line for line in told if line.startswith("NOT enforced here: "))
        assert missing.startswith("NOT enforced here: CPU, memory, ")
        assert "tasks, CPU weight, I/O weight: on cgroup v1 a user's service manager" in missing
        assert " WARNING " in next(line for line in done.stderr.splitlines() if missing in line)
    assert list((work_dir / "jobs").iterdir()) == []
    assert cgroups("ffmpeg-job-*") == cgroups("ffmpeg-limits-*") == []


@pytest.mark.parametrize(
    ("flags", "environment", "sentence"),
    [
        (
            (),
            {},
            "cannot use the work directory /var/lib/ffmpeg-worker: Permission denied; make it"
            " writable or choose another with WORK_DIR (--work-dir)",
        ),
        (("--work-dir", "work"), {"XDG_RUNTIME_DIR": ""}, "no user bus"),
        (
            ("--work-dir", "work"),
            {"XDG_RUNTIME_DIR": "/run/user/77"},
            "cannot connect to D-Bus at unix:path=/run/user/77/bus",
        ),
    ],
)
def test_a_user_without_folder_or_bus_is_told_what_is_missing(
    user: User, flags: tuple[str, ...], environment: dict[str, str], sentence: str
) -> None:
    flags = tuple(str(user.home / word) if word == "work" else word for word in flags)
    done = user.worker("run", "--user", *flags, "job.json", **environment)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"ffmpeg-worker: {sentence}")


def test_the_bus_may_be_named_by_its_address(user: User) -> None:
    address = f"unix:path={user.runtime_dir}/bus"
    done = user.worker(
        *("run", "--user", "--work-dir", str(user.home / "work"), "job.json"),
        XDG_RUNTIME_DIR="",
        DBUS_SESSION_BUS_ADDRESS=address,
    )
    assert done.returncode == 0, done.stderr
