"""The worker as a service of a real systemd, against a demo master. Runs inside the test bed."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import accounts
from tests.fakes.master import FakeMaster
from tests.slowness import SLOWNESS

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / ".venv/bin/ffmpeg-worker"
UNITS = Path("/run/systemd/system")
SERVICE = "ffmpeg-worker.service"
WORK_DIR = Path("/var/lib/ffmpeg-worker")
CONFIG = Path("/run/ffmpeg-worker-test.env")
METRICS_PORT = 19091


def sh(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        pytest.fail(f"{command} gave {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def job_units() -> list[str]:
    listed = sh("systemctl", "list-units", "--all", "--plain", "--no-legend", "ffmpeg-job-*")
    return [line.split()[0] for line in listed.splitlines()]


def job_cgroups() -> list[str]:
    return [str(path) for path in Path("/sys/fs/cgroup").glob("**/ffmpeg-job-*")]


class Worker:
    """ffmpeg-worker.service, as it is shipped but for where the program and its config lie."""

    def __init__(self) -> None:
        self._since = ""

    def start(self, master: FakeMaster, **config: str) -> None:
        settings = {
            "MASTER_URL": master.url,
            "NODE_NAME": "node-a",
            "POLL_INTERVAL": "200ms",
            "HEARTBEAT_INTERVAL": "1s",
            "MAX_CONCURRENT_JOBS": "2",
            "METRICS_PORT": str(METRICS_PORT),
            "LOG_LEVEL": "debug",
            "STOP_GRACE": "0s",
            "JOB_CHECK_INTERVAL": "1s",
            # Besides the defaults, where tests keep their files.
            "INPUT_DIRS": f"{WORK_DIR}/media:/tmp",
            "OUTPUT_DIRS": f"{WORK_DIR}:/tmp",
        }
        settings |= config
        CONFIG.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        self.cursor()
        sh("systemctl", "start", SERVICE)

    def cursor(self) -> None:
        """From here on log() reads."""
        text = sh("journalctl", "-n", "0", "--show-cursor")
        self._since = text.rpartition("cursor: ")[2].strip()

    def stop(self) -> None:
        sh("systemctl", "stop", SERVICE)

    def log(self) -> str:
        sh("journalctl", "--sync")
        since = [f"--after-cursor={self._since}"] if self._since else []
        return sh("journalctl", "-o", "cat", "-u", SERVICE, *since)

    def show(self, name: str) -> str:
        return sh("systemctl", "show", SERVICE, "-p", name, "--value").strip()

    def get(self, path: str) -> tuple[int, str]:
        url = f"http://127.0.0.1:{METRICS_PORT}{path}"
        try:
            with urllib.request.urlopen(url, timeout=5 * SLOWNESS) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def ready(self) -> tuple[int, dict[str, Any]]:
        status, body = self.get("/ready")
        document: dict[str, Any] = json.loads(body)
        return status, document

    def metric(self, name: str) -> float:
        """The sum of a metric's series."""
        _, body = self.get("/metrics")
        rows = [line for line in body.splitlines() if line.partition("{")[0] == name]
        assert rows, f"no {name} in:\n{body}"
        return sum(float(line.rpartition(" ")[2]) for line in rows)


@pytest.fixture(scope="session", autouse=True)
def installed() -> Iterator[None]:
    assert os.environ.get("FFMPEG_WORKER_BED") == "1", (
        "these tests start a system service, so they only run in the test bed: "
        "tests/bed/bed.py run -- .venv/bin/python -m pytest tests/e2e"
    )
    accounts.ensure()
    UNITS.mkdir(exist_ok=True)
    for unit in (ROOT / "units").glob("*.slice"):
        (UNITS / unit.name).write_text(unit.read_text())
    text = (ROOT / "units" / SERVICE).read_text()
    text = text.replace("/usr/local/bin/ffmpeg-worker", str(PROGRAM))
    text = text.replace("/etc/ffmpeg-worker/config.env", str(CONFIG))
    text = text.replace("RestartSec=10s", "RestartSec=100ms\nReadWritePaths=/tmp")
    (UNITS / SERVICE).write_text(text)
    sh("systemctl", "daemon-reload")
    yield
    for unit in (*(ROOT / "units").glob("*.slice"), Path(SERVICE)):
        (UNITS / unit.name).unlink(missing_ok=True)
    sh("systemctl", "daemon-reload")


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    sh("systemctl", "stop", SERVICE, check=False)
    sh("systemctl", "reset-failed", SERVICE, check=False)
    assert job_units() == []
    assert job_cgroups() == []
    assert [path.name for path in WORK_DIR.glob("jobs/*")] == []
    for path in WORK_DIR.glob("ledger.db*"):  # the next test knows nothing of this one
        path.unlink()


@pytest.fixture
def master() -> Iterator[FakeMaster]:
    with FakeMaster(max_retries=0) as master:
        yield master


@pytest.fixture(scope="module")
def make_media(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes small videos: ``make_media("in.mp4", seconds=2, size="160x120", rate=10)``."""
    folder = tmp_path_factory.mktemp("media")

    def make(name: str, *, seconds: float = 2, size: str = "160x120", rate: int = 10) -> Path:
        path = folder / name
        source = f"testsrc2=size={size}:rate={rate}:duration={seconds}"
        command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source]
        sh(*command, "-preset", "ultrafast", "-pix_fmt", "yuv420p", str(path))
        return path

    return make


def parameters(**values: Any) -> dict[str, Any]:
    """A small and quick job."""
    return {"scenario": "160x120p10-h264", "parameters": {"duration": 1, **values}}


def until(what: Callable[[], Any], timeout: float = 20, name: str = "") -> Any:
    """What ``what()`` returns, once it is true: for states that nothing announces to a test."""
    deadline = time.monotonic() + timeout * SLOWNESS
    while not (value := what()):
        assert time.monotonic() < deadline, name or "not in time"
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def long_job(make_media: Callable[..., Path]) -> dict[str, Any]:
    """A job that runs for minutes if nobody stops it."""
    source = make_media("long.mp4", seconds=max(3, 60 / SLOWNESS), size="640x360", rate=30)
    return {
        "scenario": "whatever",
        "parameters": {
            "input": str(source),
            "codec": "h265",
            "preset": "placebo",
            "resource_limits": {"max_cpu_percent": 20},
        },
    }


def running(job_id: str) -> str:
    """Wait until the job's unit runs; its name."""
    unit = f"ffmpeg-job-{job_id}.service"
    until(lambda: sh("systemctl", "is-active", unit, check=False).strip() == "active")
    return unit
