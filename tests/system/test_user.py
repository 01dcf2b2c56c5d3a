"""The agent without root: a lingering user's service manager, and what it is able to enforce.

On cgroup v2 its limits hold as root's do. On v1 none does, and the agent says so. Runs inside the
test bed, which sets FFMPEG_WORKER_BED.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.master import FakeMaster
from tests.lingering import User, lingering_user
from tests.slowness import SLOWNESS

CGROUPS = Path("/sys/fs/cgroup")
V2 = (CGROUPS / "cgroup.controllers").exists()
CPU_PERCENT = 20
LIMITS = {"max_cpu_percent": CPU_PERCENT, "max_memory_mb": 300, "timeout_sec": 600}
IN_FORCE = {
    "cpu.max": f"{CPU_PERCENT * 1000} 100000",
    "cpu.weight": "42",
    "memory.max": str(300 << 20),
    "memory.swap.max": "0",
    "memory.oom.group": "1",
    "pids.max": "512",
}


@pytest.fixture(scope="module")
def user() -> Iterator[User]:
    with lingering_user("agent") as user:
        yield user


def video(user: User, name: str, size: str, seconds: int) -> str:
    path = user.home / name
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i"]
    command += [f"testsrc2=size={size}:rate=30:duration={seconds}", "-preset", "ultrafast"]
    subprocess.run([*command, str(path)], check=True, stdin=subprocess.DEVNULL)
    shutil.chown(path, user.uid)
    return str(path)


@pytest.fixture(scope="module")
def master() -> Iterator[FakeMaster]:
    with FakeMaster(max_retries=0) as master:
        yield master


class Agent:
    """ffmpeg-worker of that user, with a log of its own."""

    def __init__(self, user: User, master: FakeMaster, log: Path) -> None:
        self._log = log
        environment = {
            "MASTER_URL": master.url,
            "NODE_NAME": "rootless",
            "INPUT_DIRS": str(user.home),
            "POLL_INTERVAL": "200ms",
            "METRICS_PORT": "0",
            "STOP_GRACE": "0s",
        }
        with log.open("wb") as file:
            self.process = user.start(
                *("--user", "--work-dir", str(user.home / "work")),
                environment=environment,
                stdout=file,
                stderr=file,
            )

    def log(self) -> str:
        return self._log.read_text()


@pytest.fixture(scope="module")
def agent(
    user: User, master: FakeMaster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Agent]:
    """Ended at the end, in the middle of a job, with no unit, no cgroup and no file of it left."""
    agent = Agent(user, master, tmp_path_factory.mktemp("agent") / "agent.log")
    with agent.process as process:
        try:
            master.wait_for_request("GET /jobs/next", timeout=60)
            yield agent
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(60 * SLOWNESS)
            print(agent.log())
    assert status == 0
    assert list(CGROUPS.glob("**/ffmpeg-job-*")) == []
    assert list((user.home / "work").glob("jobs/*")) == []
    assert list((user.home / "work").glob("accepted/*")) == []


def until(what: Callable[[], Any], timeout: float = 20) -> Any:
    """What ``what()`` returns, once it is true: for states that nothing announces to a test."""
    deadline = time.monotonic() + timeout * SLOWNESS
    while not (value := what()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
    return value


def used(cgroup: Path) -> float:
    """Seconds of CPU time that a cgroup has used."""
    table = dict(line.split() for line in (cgroup / "cpu.stat").read_text().splitlines())
    return int(table["usage_usec"]) / 1e6


def test_it_is_told_what_holds(user: User, master: FakeMaster, agent: Agent) -> None:
    (node,) = master.store.nodes.values()
    told = [line.partition("enforcement: ")[2] for line in agent.log().splitlines()]
    (line,) = [line for line in told if line.startswith("limits that the kernel enforces here: ")]
    limits = node["labels"]["limits"].split(",")
    if V2:
        assert line.startswith("limits that the kernel enforces here: CPU, memory, ")
        assert "tasks (cgroup v2, user manager); CPU weight" in line
        assert {"cpu", "memory", "tasks"} <= set(limits)
    else:
        assert line == "limits that the kernel enforces here: none (cgroup v1, user manager)"
        assert limits == [""]
        assert any(line.startswith("NOT enforced here: CPU, memory, ") for line in told)


@pytest.mark.usefixtures("agent")
def test_limits_of_a_running_job(user: User, master: FakeMaster) -> None:
    source = video(user, "long.mp4", "640x360", 20)  # it takes minutes to encode
    parameters = {"input": source, "codec": "h265", "preset": "placebo", "resource_limits": LIMITS}
    weight = {"wrapper_constraints": {"cpu_weight": 42}}
    job = master.submit({"scenario": "long", "parameters": parameters}, extra=weight)
    name = f"ffmpeg-job-{job['id']}.service"
    found = until(lambda: list(CGROUPS.glob(f"**/{user.manager}/**/{name}")))
    if V2:
        (cgroup,) = found
        assert cgroup.parent.name == "ffmpeg-default.slice"
        assert {name: (cgroup / name).read_text().strip() for name in IN_FORCE} == IN_FORCE
        until(lambda: used(cgroup) > 0.2)
        before, begun = used(cgroup), time.monotonic()
        time.sleep(5)
        share = (used(cgroup) - before) / (time.monotonic() - begun)
        assert share <= 1.1 * CPU_PERCENT / 100
    else:
        (cgroup,) = [path for path in found if (path / "cpu.stat").exists()]
        until(lambda: used(cgroup) > 0.2)  # it runs: one that failed is gone by now
        # in the hierarchies without controllers only: no file of a limit is there
        assert [path for path in found if any(any(path.glob(name)) for name in IN_FORCE)] == []


@pytest.mark.usefixtures("agent")
def test_a_job_over_its_memory_limit(user: User, master: FakeMaster) -> None:
    parameters = {
        "input": video(user, "large.mp4", "1920x1080", 1),
        "preset": "ultrafast",
        "resource_limits": {"max_memory_mb": 40},
    }
    job = master.submit({"scenario": "large-h264", "parameters": parameters})

    master.wait(job["id"], timeout=120)

    [result] = [result for result in master.results if result["job_id"] == job["id"]]
    if V2:
        assert result["error"].startswith("resource_error: memory limit of 40 MB exceeded")
        assert 38 << 20 < result["metrics"]["memory_peak_bytes"] <= 40 << 20
    else:
        assert result["status"] == "completed", json.dumps(result)
