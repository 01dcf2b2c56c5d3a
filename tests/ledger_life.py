"""The life of one job in a ledger, and the ledger as it lies on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from worker.ledger import Entry, Ledger
from worker.master.wire import Job, JobResult

JOB = Job.model_validate({"id": "job-1", "parameters": {"text": "x" * 1000}})
RESULT = JobResult(job_id="job-1", node_id="n", status="completed", logs="x" * 4000)

LIFE: tuple[Callable[[Ledger], object], ...] = (
    lambda ledger: ledger.accept(JOB),
    lambda ledger: ledger.starting(1, "input", "job-1-input.service", {}),
    lambda ledger: ledger.starting(1, "main", "job-1.service", {"width": 1920}),
    lambda ledger: ledger.reissue(1, JOB.model_copy(update={"retry_count": 1})),
    lambda ledger: ledger.finish(1, RESULT, {"cpu": 1}),
    lambda ledger: ledger.settle(1, "delivered"),
    lambda ledger: ledger.reap(1),
    lambda ledger: ledger.put("draining", "1"),
    lambda ledger: ledger.prune(0, 0),
)
"""Each step of it, in order."""


def log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def content(ledger: Ledger) -> tuple[list[Entry], str | None]:
    return ledger.recent(100), ledger.get("draining")


def copy(path: Path, folder: Path, log_bytes: int | None = None) -> Path:
    """The ledger as it lies on the disk now, with that much of its log."""
    folder.mkdir()
    shutil.copy(path, folder)
    if log_of(path).exists():
        (folder / log_of(path).name).write_bytes(log_of(path).read_bytes()[:log_bytes])
    return folder / path.name


def read(path: Path) -> tuple[list[Entry], str | None]:
    ledger = Ledger.open(path)
    try:
        return content(ledger)
    finally:
        ledger.close()
