"""The machine with the agent on it: the service, its folders, its journal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import accounts
from tests.chaos import points
from tests.slowness import SLOWNESS
from worker.ledger import Entry, reading

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv/bin/python"
UNITS = Path("/run/systemd/system")
SERVICE = "ffmpeg-worker.service"
WORK_DIR = Path("/var/lib/ffmpeg-worker")
CONFIG = points.FOLDER / "config.env"
OUTPUTS = points.FOLDER / "out"
STATE_MB = 96
UNIT_STARTED = "39f53479d3a045ac8e11786248231fbf"
"""systemd's message id for a start that is done (sd-messages.h)."""


class ChaosError(Exception):
    """The run itself cannot go on."""


def sh(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        raise ChaosError(f"{command} gave {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def until(what: Callable[[], object], timeout: float, name: str) -> None:
    """Wait for a state that nothing announces. Raises ChaosError."""
    deadline = time.monotonic() + timeout * SLOWNESS
    while not what():
        if time.monotonic() > deadline:
            raise ChaosError(f"{name}: not within {timeout:g} s")
        time.sleep(0.02)


@dataclass(frozen=True)
class Start:
    """A unit that systemd started. ``at`` is in Unix time."""

    at: float
    unit: str
    invocation: str


class Node:
    """``settings`` are of the agent; STOP_MODE can be changed for its next start."""

    def __init__(self, url: str, **settings: str) -> None:
        self._settings = {
            "MASTER_URL": url,
            "NODE_NAME": "node-a",
            "POLL_INTERVAL": "200ms",
            "HEARTBEAT_INTERVAL": "1s",
            "JOB_CHECK_INTERVAL": "1s",
            "MAX_CONCURRENT_JOBS": "3",
            "METRICS_PORT": "0",
            "STOP_GRACE": "0s",
            "STOP_MODE": "handback",
            "DEFAULT_DISK_MB": "10",
            "INPUT_DIRS": str(points.FOLDER),
            "OUTPUT_DIRS": str(points.FOLDER),
            **settings,
        }
        self._cursor = (
            sh("journalctl", "-n", "0", "--show-cursor").rpartition("cursor: ")[2].strip()
        )
        self.full: list[tuple[float, float]] = []
        """When the disk was full (Unix times)."""
        self._full_since = 0.0

    # --- the service

    def start(self, **settings: str) -> None:
        self._settings |= settings
        CONFIG.write_text("".join(f"{key}={value}\n" for key, value in self._settings.items()))
        sh("systemctl", "start", SERVICE, check=False)  # an agent that dies early is started anew

    def stop(self) -> None:
        sh("systemctl", "stop", SERVICE)

    def restart(self) -> None:
        sh("systemctl", "restart", SERVICE, check=False)

    def show(self, name: str, unit: str = SERVICE) -> str:
        return sh("systemctl", "show", unit, "-p", name, "--value").strip()

    def kill(self) -> float:
        """kill -9 of the agent, at once or as soon as there is one; when that was."""
        pid = 0

        def found() -> bool:
            nonlocal pid
            pid = int(self.show("MainPID") or 0)
            return pid > 0

        until(found, 30, "an agent to kill")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return time.time()

    def command(self, word: str) -> bool:
        """``ffmpeg-worker drain`` and the like; False if no agent answered."""
        done = subprocess.run(
            [PYTHON, "-m", "worker", word, "--work-dir", str(WORK_DIR)],
            cwd=ROOT, capture_output=True,
        )  # fmt: skip
        return done.returncode == 0

    # --- the disk

    def fill(self) -> None:
        """Write until there is no space left in the state directory."""
        self._full_since = self._full_since or time.time()
        with (WORK_DIR / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**16))

    def empty(self) -> None:
        (WORK_DIR / "filler").unlink(missing_ok=True)
        if self._full_since:
            self.full.append((self._full_since, time.time()))
            self._full_since = 0.0

    # --- what is there

    def starts(self) -> list[Start]:
        """All starts of units of jobs so far, in order."""
        sh("journalctl", "--sync")
        text = sh(
            "journalctl", "-o", "json", f"--after-cursor={self._cursor}", "_PID=1",
            f"MESSAGE_ID={UNIT_STARTED}",
        )  # fmt: skip
        rows = [json.loads(line) for line in text.splitlines()]
        return [
            Start(int(row["__REALTIME_TIMESTAMP"]) / 1e6, row["UNIT"], row["INVOCATION_ID"])
            for row in rows
            if row.get("UNIT", "").startswith("ffmpeg-job-")
        ]

    def log(self) -> list[str]:
        """What the agent and systemd said about the service."""
        sh("journalctl", "--sync")
        command = ["journalctl", "-o", "short-unix", f"--after-cursor={self._cursor}"]
        return sh(*command, "-u", SERVICE).splitlines()

    def entries(self) -> list[Entry]:
        """What is in the ledger, read beside the agent."""
        with contextlib.closing(
            sqlite3.connect(f"file:{WORK_DIR}/ledger.db?mode=ro", uri=True, timeout=5)
        ) as db:
            return reading.entries(db, "ORDER BY id")

    def left(self) -> list[str]:
        """Everything that is still there of jobs."""
        units = sh("systemctl", "list-units", "--all", "--plain", "--no-legend", "ffmpeg-job-*")
        found = [f"unit {line.split()[0]}" for line in units.splitlines()]
        found += [f"cgroup {path}" for path in Path("/sys/fs/cgroup").glob("**/ffmpeg-job-*")]
        found += [f"folder {path}" for path in WORK_DIR.glob("jobs/*")]
        for folder in (Path("/run/systemd/transient"), Path("/run/systemd/units")):
            found += [f"file {path}" for path in folder.glob("*ffmpeg-job-*")]
        found += [f"file {path}" for path in OUTPUTS.glob(".*")]
        found += [
            f"ledger: {entry.job.id} (retry {entry.job.retry_count}) is {entry.state}"
            for entry in self.entries()
            if entry.reaped_at is None
        ]
        return found


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """The service, its slices and a small disk for its state; all as before at the end."""
    if os.environ.get("FFMPEG_WORKER_BED") != "1":
        raise ChaosError(
            "this starts a system service, so it only runs in the test bed: "
            "tests/bed/bed.py run -- .venv/bin/python -m tests.chaos"
        )
    accounts.ensure()
    text = (ROOT / "units" / SERVICE).read_text()
    text = text.replace("/usr/local/bin/ffmpeg-worker", f"{PYTHON} -P {ROOT}/tests/chaos/agent.py")
    text = text.replace("/etc/ffmpeg-worker/config.env", str(CONFIG))
    text = text.replace("RestartSec=10s", f"RestartSec=100ms\nReadWritePaths={points.FOLDER}")
    text = text.replace("[Service]\n", "StartLimitIntervalSec=0\n\n[Service]\n", 1)
    wanted = {UNITS / unit.name: unit.read_text() for unit in (ROOT / "units").glob("*.slice")}
    wanted[UNITS / SERVICE] = text
    before = {path: path.read_text() if path.exists() else None for path in wanted}
    UNITS.mkdir(exist_ok=True)
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    sh("mount", "-t", "tmpfs", "-o", f"size={STATE_MB}m,mode=700", "chaos", str(WORK_DIR))
    try:
        for path, content in wanted.items():
            path.write_text(content)
        sh("systemctl", "daemon-reload")
        yield
    finally:
        sh("systemctl", "stop", SERVICE, check=False)
        sh("systemctl", "reset-failed", SERVICE, check=False)
        sh("umount", "--lazy", str(WORK_DIR))
        for path, old in before.items():
            if old is None:
                path.unlink()
            else:
                path.write_text(old)
        sh("systemctl", "daemon-reload")
