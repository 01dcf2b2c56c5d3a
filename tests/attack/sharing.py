"""One worker for many attacks, since each start takes seconds; and what they are made of."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attack.conftest import MEDIA, Result, Target, left_of_jobs, snapshot
from tests.e2e.conftest import (
    SERVICE,
    WORK_DIR,
    Worker,
    parameters,
    running,
    sh,
)
from tests.fakes.master import FakeMaster
from tests.slowness import SLOWNESS
from worker.systemd.names import safe_id

SHIPPED = {
    "INPUT_DIRS": str(MEDIA),
    "OUTPUT_DIRS": str(WORK_DIR),
}
INPUT = MEDIA / "in.mp4"
HELD = 1_000_000
"""The bitrate of a job that waits until it is let go."""
STRANGER = 12345
"""A uid that is nobody's: of a user who may write in some folder of media."""
ELSEWHERE = Path("/srv/elsewhere")
"""Root's own folder, outside of all that jobs may name."""

_SWAP = """
import ctypes, os, random, sys, time
libc = ctypes.CDLL(None, use_errno=True)
one, other = map(os.fsencode, sys.argv[1:])
while True:
    if libc.renameat2(-100, one, -100, other, 2):
        sys.exit(os.strerror(ctypes.get_errno()))
    time.sleep(random.choice((0, 0, 0.001, 0.01)))
"""


Maker = Callable[[Path], object]
"""Has something stand at a path."""


class Scene(Target):
    """A worker that several tests share, one after the other."""

    begun = 0

    def still_beats(self) -> None:
        """That is asked for at the end, where each attack before left the agent at work."""

    def take_note(self) -> None:
        """Only of where these tests put things: elsewhere nothing has changed since the start."""
        places = (str(WORK_DIR), str(ELSEWHERE))
        below = tuple(f"{place}/" for place in places)
        kept = {path: was for path, was in self._before.items() if not path.startswith(below)}
        self._before = kept | snapshot(*places)

    def turns_down(self, job: dict[str, Any], text: str) -> None:
        """Have a job that fails with that text before anything is started for it."""
        self.take_note()
        result = self.refused(job, text)
        assert "unit" not in result["metrics"], "nothing was started"
        self.unharmed()

    def begin(self, job: dict[str, Any], job_id: str = "", **labels: str) -> str:
        """Have a job run under the intruder's order ``wait``; its id."""
        self.begun += 1
        job_id = job_id or f"held-{self.begun}"
        self.master.submit(job, {"id": job_id, **labels})
        running(safe_id(job_id))
        return job_id

    def files(self, job_id: str) -> Path:
        """The folder that a job writes to."""
        return WORK_DIR / "jobs" / safe_id(job_id) / "files"

    def end(self, job_id: str, timeout: float = 60) -> Result:
        """Let such a job go on; what the master is told of it."""
        (self.files(job_id) / "go").touch()
        return self.ended(job_id, timeout)

    def ended(self, job_id: str, timeout: float = 60) -> Result:
        """What the master is told of a job."""
        self.master.wait(job_id, timeout * SLOWNESS)
        [result] = [one for one in self.master.results if one["job_id"] == job_id]
        return result


@contextlib.contextmanager
def attacked(**config: str) -> Iterator[Scene]:
    """A worker with the shipped configuration, but for addresses and intervals."""
    make_video(INPUT, 1)
    MEDIA.chmod(0o755)
    worker = Worker()
    with FakeMaster(max_retries=0) as master:
        try:
            scene = Scene(worker, master, **(SHIPPED | config))
            yield scene
            Target.still_beats(scene)
        finally:
            sh("systemctl", "stop", SERVICE, check=False)
            sh("systemctl", "reset-failed", SERVICE, check=False)
    assert left_of_jobs() == []
    for path in WORK_DIR.glob("ledger.db*"):
        path.unlink()


def make_video(path: Path, seconds: int, title: str = "") -> None:
    """A small video that everybody may read, unless there is one already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        source = f"testsrc2=size=160x120:rate=10:duration={seconds}"
        command = ("/usr/bin/ffmpeg", "-v", "error", "-f", "lavfi", "-i", source)
        sh(*command, "-metadata", f"title={title}", "-preset", "ultrafast", str(path))
        path.chmod(0o644)


def seconds_of(path: Path) -> float:
    """The length of a video."""
    document = json.loads(
        sh("/usr/bin/ffprobe", "-v", "error", "-show_format", "-of", "json", f"file:{path}")
    )
    return float(document["format"]["duration"])


def reading(path: object = INPUT, **values: Any) -> dict[str, Any]:
    """A job that reads a file."""
    job = parameters(input=str(path), preset="ultrafast", **values)
    del job["parameters"]["duration"]
    return job


def writing(path: object, source: object = INPUT, **values: Any) -> dict[str, Any]:
    """A job that leaves a file."""
    return reading(source, output=str(path), **values)


@contextlib.contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """Meanwhile a stranger has the two change places, as fast as it goes and slower."""
    command = ("/usr/bin/python3", "-c", _SWAP, str(one), str(other))
    with subprocess.Popen(
        command, user=STRANGER, group=STRANGER, extra_groups=(), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield
            assert process.poll() is None, process.stderr and process.stderr.read()
        finally:
            process.kill()


def give_away(*paths: Path) -> None:
    """To the stranger."""
    for path in paths:
        os.lchown(path, STRANGER, STRANGER)


def link(target: object) -> Maker:
    return lambda path: path.symlink_to(str(target))


def ours(path: Path) -> None:
    """An older output."""
    path.write_bytes(b"older")
    os.chown(path, *ids_of("ffmpeg-worker"))


def ids_of(name: str) -> tuple[int, int]:
    """Of a user, and of the group of that name."""
    return pwd.getpwnam(name).pw_uid, grp.getgrnam(name).gr_gid


def assert_good(path: Path, owner: tuple[int, int] | None = None) -> None:
    """A whole video with the owner and mode of an output, and nothing else of it."""
    found = path.lstat()
    assert stat.S_ISREG(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o644
    assert found.st_nlink == 1
    assert (found.st_uid, found.st_gid) == (owner or ids_of("ffmpeg-worker"))
    assert seconds_of(path) == pytest.approx(1, abs=0.2)
    assert list(path.parent.glob(".*")) == []
