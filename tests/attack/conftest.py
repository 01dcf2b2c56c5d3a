"""The worker as it is shipped, on a real systemd, and what an attack on it must not change."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.attack.intruder import MARK, ORDERS
from tests.attack.servers import Server
from tests.e2e.conftest import (  # noqa: F401 - fixtures
    CONFIG,
    SERVICE,
    WORK_DIR,
    Worker,
    installed,
    job_cgroups,
    job_units,
    master,
    sh,
    until,
    worker,
)
from tests.e2e.conftest import PROGRAM as WORKER
from tests.fakes.master import FakeMaster
from tests.slowness import SLOWNESS

MEDIA = WORK_DIR / "media"
PROGRAM = Path("/usr/local/bin/ffmpeg")
_WATCHED = ("/etc", "/usr/local", "/srv", "/home", "/root", "/opt", "/tmp", "/var")
_CHANGES = ("/var/log", "/var/lib/systemd", "/var/lib/private", "/var/cache", "/var/tmp")
"""What the rest of the system writes to."""
_LEFT_OUT = {
    *_CHANGES,
    str(ORDERS),
    *(f"{WORK_DIR}/ledger.db{suffix}" for suffix in ("", "-wal", "-shm")),
    *(f"{WORK_DIR}/{name}" for name in ("control.sock", "jobs", "root")),
}
_AT_WORK = {"MAX_CONCURRENT_JOBS": "4", "POLL_INTERVAL": "100ms"}
"""As many jobs at a time as when nothing is said, and the next one soon."""
_PASSING = ("systemd-private-", "pytest-of-")

Result = dict[str, Any]


def snapshot(*tops: str) -> dict[str, tuple[int, ...]]:
    """Each file that no job may change: mode, owner, size, time of change.

    On the whole machine, or below these folders: all of it are some ten thousand files.
    """
    found: dict[str, tuple[int, ...]] = {}
    folders = [*(tops or _WATCHED)]
    while folders:
        with contextlib.suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.path in _LEFT_OUT:
                    continue
                if not entry.is_dir(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        found[entry.path] = _facts(entry.stat(follow_symlinks=False))
                # In root's home to .ssh/authorized_keys, not through whole toolchains.
                elif not (entry.path.startswith("/root/") and entry.path.count("/") > 3) and (
                    not entry.name.startswith(_PASSING)
                ):
                    folders.append(entry.path)
    return found


def _facts(status: os.stat_result) -> tuple[int, ...]:
    return (
        status.st_mode, status.st_uid, status.st_gid, status.st_size,
        status.st_mtime_ns, status.st_ino, status.st_nlink,
    )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A job that must fail: as a client submits it, and with what the report must say."""

    body: Any
    says: str | Sequence[str] = ""
    reason: str = "user_error"
    """Or several, with ``|`` between them."""
    extra: Any = None


class Target:
    """A worker under attack."""

    def __init__(self, worker: Worker, master: FakeMaster, **config: str) -> None:  # noqa: F811
        self.worker, self.master = worker, master
        self._start(config)

    def _start(self, config: Mapping[str, str]) -> None:
        self.worker.start(self.master, **(_AT_WORK | dict(config)))
        until(lambda: self.worker.ready()[0] == 200, name="the worker takes no jobs")
        self._pid = self.worker.show("MainPID")
        self._before = snapshot()

    @contextlib.contextmanager
    def configured(self, **config: str) -> Iterator[None]:
        """Started anew with that configuration, and again as it was in the end."""
        self.worker.stop()
        self._start(config)
        try:
            yield
        finally:
            self.worker.stop()
            self._start({})

    @property
    def port(self) -> int:
        """Where something on this host listens."""
        return int(self.master.url.rpartition(":")[2])

    def run(self, job: Any, extra: Any = None, timeout: float = 60) -> Result:
        """What the master is told of a job."""
        job_id = self.master.submit(job, extra)["id"]
        self.master.wait(job_id, timeout * SLOWNESS)
        [result] = [one for one in self.master.results if one["job_id"] == job_id]
        return result

    def refused(self, job: Any, *texts: str, reason: str = "user_error") -> Result:
        """Run a job that must fail for that reason, with each of these texts in its error."""
        result = self.run(job)
        assert result["status"] == "failed", result
        assert result["metrics"]["failure_reason"] == reason, result
        for text in texts:
            assert text in result["error"], result["error"]
        return result

    def run_all(self, jobs: Mapping[str, Job], timeout: float = 60) -> dict[str, Result]:
        """What the master is told of each of these jobs, by the name that a test gives it.

        They are all submitted at once.
        """
        ids = {name: self.master.submit(job.body, job.extra)["id"] for name, job in jobs.items()}
        with self.master.store.changed:  # a master gives jobs for GPUs to nodes that have one
            for node in self.master.store.nodes.values():
                node["has_gpu"] = True
        for job_id in ids.values():
            self.master.wait(job_id, timeout)
        told = {result["job_id"]: result for result in self.master.results}
        return {name: told[job_id] for name, job_id in ids.items()}

    def all_fail(self, jobs: Mapping[str, Job], timeout: float = 60) -> dict[str, Result]:
        """Run jobs that must fail as each of them says. Those turned down never get a unit."""
        results = self.run_all(jobs, timeout)
        wrong = {}
        for name, job in jobs.items():
            result, reasons = results[name], job.reason.split("|")
            metrics = result["metrics"]
            texts = [job.says] if isinstance(job.says, str) else job.says
            if (
                result["status"] != "failed"
                or metrics["failure_reason"] not in reasons
                or not all(text in result["error"] for text in texts)
                or ("unit" in metrics and reasons == ["user_error"])
            ):
                wrong[name] = (result["status"], result.get("error"), metrics.get("unit"))
        assert wrong == {}
        return results

    def unharmed(self, *made: Path) -> None:
        """The agent lives and works, and nothing but ``made`` is new or changed on the host."""
        shown = sh("systemctl", "show", SERVICE, "-p", "ActiveState,NRestarts,MainPID")
        assert set(shown.split()) == {"ActiveState=active", "NRestarts=0", f"MainPID={self._pid}"}
        assert self.worker.get("/health")[0] == 200
        self.still_beats()
        after = snapshot()
        for path in made:
            assert after.pop(str(path), None), f"{path} was not made"
            self._before.pop(str(path), None)
        changed = {
            path: (self._before.get(path), after.get(path))
            for path in self._before.keys() | after.keys()
            if self._before.get(path) != after.get(path)
        }
        assert changed == {}

    def take_note(self) -> None:
        """From here on unharmed() compares: the test itself has changed something."""
        self._before = snapshot()

    def still_beats(self) -> None:
        """Heartbeats go on."""
        beat = "POST /nodes/*/heartbeat"
        beats = len(self.master.seen(beat))
        until(lambda: len(self.master.seen(beat)) > beats, name="no more heartbeats")


@pytest.fixture
def target(worker: Worker, master: FakeMaster, media: Path) -> Target:  # noqa: F811
    """With the configuration that is shipped, but for addresses and intervals."""
    return Target(worker, master)


@pytest.fixture(scope="module")
def standing(installed: None) -> Iterator[Target]:  # noqa: F811
    """One target for all tests of a module that leave it as it was: a start takes seconds."""
    _make_media()
    with FakeMaster(max_retries=0) as master:  # noqa: F811
        try:
            yield Target(Worker(), master)
        finally:
            sh("systemctl", "stop", SERVICE, check=False)
            sh("systemctl", "reset-failed", SERVICE, check=False)
            for path in WORK_DIR.glob("ledger.db*"):
                path.unlink()
    assert left_of_jobs() == []


def left_of_jobs() -> list[str]:
    """Units, processes and files of jobs."""
    return [*job_units(), *job_cgroups(), *map(str, WORK_DIR.glob("jobs/*"))]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def media(installed: None) -> Path:  # noqa: F811
    """A small video where inputs are."""
    return _make_media()


def _make_media() -> Path:
    MEDIA.mkdir(parents=True, exist_ok=True)
    path = MEDIA / "in.mp4"
    if not path.exists():
        source = "testsrc2=size=160x120:rate=10:duration=1"
        sh("/usr/bin/ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, str(path))
    return path


_HISTORIES = """
import sys
from worker import cli
config, *ids = sys.argv[1:]
sys.exit(max([cli.main(["history", "--config", config, "--", job_id]) for job_id in ids]))
"""


def histories(job_ids: Iterable[str]) -> str:
    """What ``ffmpeg-worker history`` prints of each of them, in one process: a start takes long."""
    return sh(str(WORKER.with_name("python")), "-c", _HISTORIES, str(CONFIG), *job_ids)


@contextlib.contextmanager
def folder_for_now(path: Path) -> Iterator[Path]:
    """A folder that everybody may read, until the end of a test."""
    path.mkdir()
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


class Intruder:
    """A program in the place of ffmpeg, as if its input had taken it over."""

    def order(self, do: str, *, bitrate: int | str = "*", **order: Any) -> None:
        """What it does in jobs of that bitrate from now on, see tests/attack/intruder.py."""
        orders = json.loads(ORDERS.read_text()) if ORDERS.exists() else {}
        orders[str(bitrate)] = {"do": do, **order}
        ORDERS.write_text(json.dumps(orders))
        ORDERS.chmod(0o644)

    def found(self, result: Result) -> dict[str, str]:
        """What it told."""
        lines = [line for line in result["logs"].splitlines() if line.startswith(MARK)]
        assert lines, result
        return dict(json.loads(line.removeprefix(MARK)) for line in lines)


@contextlib.contextmanager
def intruding() -> Iterator[Intruder]:
    """To be begun before a worker, which looks for programs when it starts."""
    shutil.copy(Path(__file__).with_name("intruder.py"), PROGRAM)
    text = PROGRAM.read_text()
    PROGRAM.write_text(f"#!/usr/bin/python3\n{text}")
    PROGRAM.chmod(0o755)
    try:
        yield Intruder()
    finally:
        PROGRAM.unlink()
        ORDERS.unlink(missing_ok=True)


@pytest.fixture
def intruder() -> Iterator[Intruder]:
    """To be asked for before ``target``: the worker looks for programs when it starts."""
    with intruding() as intruder:
        yield intruder
