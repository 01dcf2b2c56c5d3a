"""What a program finds that has taken over a job: nothing. The list is in intruder.attempts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.attack.conftest import MEDIA, PROGRAM, Intruder, Target
from tests.attack.intruder import MARK, attempts
from tests.e2e.conftest import WORK_DIR, parameters, running, sh, until

FILE_JOB = {"input": f"{MEDIA}/in.mp4"}
STREAM = {
    **FILE_JOB,
    "output_mode": "rtmp",
    "rtmp_url": "rtmp://127.0.0.1:1/live",
    "stream_key": "k",
}
SECRETS = (
    f"{WORK_DIR}/ledger.db",
    f"{WORK_DIR}/control.sock",
    f"{WORK_DIR}/jobs/sleeper/main.out",
    f"{WORK_DIR}/jobs/sleeper/files/main.log",
    "/run/credentials/ffmpeg-worker.service/master-api-key",
    "/run/ffmpeg-worker-test.env",
    f"{MEDIA}/other.mp4",
)
REACHED = {"connect to the host"}
"""What a streaming job is for."""


@pytest.mark.parametrize("job", [FILE_JOB, STREAM], ids=["file job", "streaming job"])
def test_every_attempt_is_denied(intruder: Intruder, target: Target, job: dict[str, Any]) -> None:
    other = MEDIA / "other.mp4"
    other.write_bytes(b"somebody else's")
    intruder.order("sleep", seconds=60, bitrate=1_000_000)
    sleeper = target.master.submit(parameters(**FILE_JOB, bitrate=1_000_000), {"id": "sleeper"})
    unit = running(sleeper["id"])
    until(lambda: Path(SECRETS[3]).parent.exists())
    pids = [
        sh("systemctl", "show", name, "-p", "MainPID", "--value").strip()
        for name in (unit, "ffmpeg-worker.service")
    ]
    order: dict[str, Any] = {
        "pids": pids,
        "files": [path for path in SECRETS if Path(path).exists()],
    }
    assert {str(other), f"{WORK_DIR}/ledger.db", f"{WORK_DIR}/control.sock"} <= set(order["files"])
    intruder.order("look_around", **order, port=target.port)

    result = target.run(parameters(**job))

    found = intruder.found(result)
    assert found.keys() == attempts(order).keys(), "each was made"
    allowed = {name: outcome for name, outcome in found.items() if not outcome.startswith("denied")}
    assert allowed.keys() == (REACHED if job is STREAM else set()), allowed
    sh("systemctl", "stop", unit)
    target.master.wait(sleeper["id"])
    other.unlink()
    target.unharmed()


def test_the_attempts_are_no_duds(intruder: Intruder) -> None:
    """An ordinary user, whom no sandbox holds, gets through with those that need no root."""
    intruder.order("look_around", pids=[1], files=["/etc/hosts"])
    folder = Path("/var/tmp/attempts")
    folder.mkdir()
    shutil.chown(folder, "nobody")
    report = f"Environment=FFREPORT=file={folder}/log:level=40"
    options = ("-p", "User=nobody", "-p", report, "-p", f"WorkingDirectory={folder}")
    sh("systemd-run", "--wait", "--quiet", *options, str(PROGRAM), "-i", "x", check=False)
    text = (folder / "log").read_text()
    shutil.rmtree(folder)
    found = dict(json.loads(line.removeprefix(MARK)) for line in text.splitlines() if MARK in line)
    allowed = {name for name, outcome in found.items() if outcome.startswith("ALLOWED")}
    assert {
        "read /etc/passwd", "read /etc/hosts", "read /proc/cmdline", "connect to the bus",
        "be traced", "a namespace of users", "a netlink socket", "writable code",
        "code made executable", "run what was dropped", "see others", "write anywhere",
        "a set-uid file", "keys", "add a key",
    } <= allowed, found  # fmt: skip
