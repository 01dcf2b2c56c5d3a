"""A ledger whose process dies in the middle of a write, and what it leaves on the disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from worker.ledger import Ledger
from worker.master.wire import Job, JobResult

R = TypeVar("R")

BOUNDS = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
CUTS = st.none() | st.floats(0, 1, exclude_max=True) | st.just(1.0)
"""Where a crash cuts what a write adds to the log: 1 is just after it, None is no crash."""


def job_of(number: int, retry: int) -> Job:
    return Job(id=f"job-{number}", retry_count=retry)


def result_of(job: Job, status: str) -> JobResult:
    return JobResult(job_id=job.id, node_id="n", status=status)


class Crashed(Exception):
    """The process is dead: nothing after the write happened. ``whole`` if all was written."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole


class Disk:
    """A ledger whose process can die in the middle of a write."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="ledger-"))
        self._turn = 0
        self.ledger = Ledger.open(self._path)

    @property
    def _path(self) -> Path:
        return self._root / str(self._turn) / "ledger.db"

    def _log(self) -> bytes:
        log = self._path.with_name("ledger.db-wal")
        return log.read_bytes() if log.exists() else b""

    def write(self, write: Callable[[], R], cut: float | None) -> R:
        """Do it; with ``cut``, go on with what a crash at that point leaves on the disk."""
        before = self._log()
        done = write()
        if cut is None:
            return done
        after = self._log()
        # Written over the remains of an earlier crash, or appended; in order.
        start = len(os.path.commonprefix([before, after]))  # noqa: RUF071 - not paths
        kept = start + int((len(after) - start) * cut)
        left = after[:kept] + before[kept:]
        source = self._path.read_bytes()
        self.ledger.close()
        self._turn += 1
        self._path.parent.mkdir()
        self._path.write_bytes(source)
        self._path.with_name("ledger.db-wal").write_bytes(left)
        self.ledger = Ledger.open(self._path)
        raise Crashed(left[: len(after)] == after)

    def crash(self) -> None:
        try:
            self.write(lambda: None, 1.0)
        except Crashed:
            return

    def end(self) -> None:
        self.ledger.close()
        shutil.rmtree(self._root)
