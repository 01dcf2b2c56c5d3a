"""Installing system-wide inside the test bed: what the tests of scripts/install.sh share."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INSTALL = ROOT / "scripts/install.sh"
WHEELS = ROOT / "build/wheels"
PREFIX = Path("/opt/ffmpeg-worker")
PROGRAM = Path("/usr/local/bin/ffmpeg-worker")
CONFIG = Path("/etc/ffmpeg-worker/config.env")
SYSTEM = Path("/etc/systemd/system")
SERVICE = "ffmpeg-worker.service"
SLICES = ("ffmpeg.slice", "ffmpeg-live.slice", "ffmpeg-default.slice", "ffmpeg-batch.slice")
SYSUSERS = Path("/etc/sysusers.d/ffmpeg-worker.conf")
TMPFILES = Path("/etc/tmpfiles.d/ffmpeg-worker.conf")
DATA = Path("/var/lib/ffmpeg-worker")
MEDIA = DATA / "media"
KEY = CONFIG.with_name("master-api-key")
USER = "ffmpeg-worker"

# The folders as the deployment guide has them made, then what is put into them. One is different:
# others than root pass through the work directory, to deliver media and to fetch outputs.
MODES = {
    "/etc/ffmpeg-worker": 0o700,
    "/var/lib/ffmpeg-worker": 0o711,
    "/var/lib/ffmpeg-worker/media": 0o755,
    "/var/log/ffmpeg-worker": 0o755,
    "/etc/ffmpeg-worker/config.env": 0o600,
    "/var/log/ffmpeg-worker/worker.log": 0o644,
    "/etc/logrotate.d/ffmpeg-worker": 0o644,
    str(SYSUSERS): 0o644,
    str(TMPFILES): 0o644,
    **{f"/etc/systemd/system/{unit}": 0o644 for unit in (SERVICE, *SLICES)},
}


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    if check and done.returncode:
        pytest.fail(f"{command} gave {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def install(check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(INSTALL, "--wheels", WHEELS, check=check)


def show(unit: str, name: str) -> str:
    return run("systemctl", "show", "--property", name, "--value", unit).stdout.strip()


def modes() -> dict[str, int]:
    return {path: stat.S_IMODE(Path(path).stat().st_mode) for path in MODES}


@contextlib.contextmanager
def first_install() -> Iterator[str]:
    """The output of an install on a machine that had none; removed at the end."""
    assert os.environ.get("FFMPEG_WORKER_BED") == "1", (
        "this test installs system-wide, so it only runs in the test bed: "
        "tests/bed/bed.py run -- .venv/bin/python -m pytest tests/system"
    )
    assert any(WHEELS.glob("ffmpeg_worker-*.whl")), "build/wheels is empty: run `make wheels`"
    run(INSTALL, "--uninstall", "--purge")
    try:
        yield install().stdout
    finally:
        run(INSTALL, "--uninstall", "--purge")


def stand_in(script: str) -> None:
    """Put a shell script in the agent's place: here it is the installer that is tested."""
    drop_in = SYSTEM / f"{SERVICE}.d/stand-in.conf"
    drop_in.parent.mkdir(exist_ok=True)
    drop_in.write_text(
        f"[Service]\nNotifyAccess=all\nExecStart=\nExecStart=/bin/sh -c '{script}'\n"
    )


@contextlib.contextmanager
def master_in_config() -> Iterator[None]:
    """MASTER_URL set as the guide does it, and no service left at the end."""
    before = CONFIG.read_text()
    CONFIG.write_text(before.replace("MASTER_IP", "192.168.1.100"))
    try:
        yield
    finally:
        run("systemctl", "stop", SERVICE)
        run("systemctl", "reset-failed", SERVICE, check=False)  # where it has failed
        (SYSTEM / f"{SERVICE}.d/stand-in.conf").unlink()
        CONFIG.write_text(before)
