"""Taking over what a worker without a ledger left behind."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from worker.errors import LedgerError
from worker.ledger import Ledger, State
from worker.master.wire import Job, JobResult

JOB = Job.model_validate(
    {"id": "a/b", "retry_count": 2, "created_at": "2026-11-24T15:00:00Z", "parameters": ["\ud800"]}
)
RESULT = JobResult(job_id="c", node_id="n", status="failed", error="why", logs="ü")


def put_down(folder: Path, name: str, job: Job, result: JobResult | None = None) -> Path:
    """As ffmpeg-worker wrote it before there was a ledger."""
    folder.mkdir(exist_ok=True)
    data: dict[str, Any] = {"job": dict(job)}
    if result is not None:
        data["result"] = dict(result)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data, default=str), encoding="ascii")
    os.utime(path, (500, 500))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "accepted"


def test_records_become_entries(ledger: Ledger, folder: Path) -> None:
    put_down(folder, "a", JOB)
    put_down(folder, "c", Job(id="c"), RESULT)
    assert ledger.import_records(folder) == 2
    open_, ended = ledger.unreaped()

    assert (open_.job, open_.state, open_.accepted_at) == (JOB, State.STARTED, 500)
    assert {step: record.facts for step, record in open_.steps.items()} == {
        "input": {"imported": True},
        "main": {"imported": True},
    }
    assert open_.steps["main"].unit.startswith("ffmpeg-job-")
    with pytest.raises(ValueError, match="it was before"):
        ledger.starting(open_.id, "main", "u", {})

    assert (ended.job.id, ended.state, ended.result) == ("c", State.FINISHED, RESULT)
    assert not folder.exists()
    assert ledger.import_records(folder) == 0


def test_records_are_not_taken_over_twice(ledger: Ledger, folder: Path) -> None:
    """As after a crash between the commit and the removal."""
    for _ in range(2):
        path = put_down(folder, "a", JOB)
        ledger.import_records(folder)
        assert not path.exists()
    [entry] = ledger.unreaped()
    ledger.settle(entry.id, "dropped", "test")
    ledger.reap(entry.id)
    put_down(folder, "a", JOB)
    assert ledger.import_records(folder) == 0
    assert ledger.unreaped() == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"{}", b'{"job": {"id": ""}}', b'{"job": 1}', b"\xff"]
)
def test_what_cannot_be_understood_is_named_and_put_aside(
    ledger: Ledger, folder: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    put_down(folder, "a", JOB)
    (folder / "broken.json").write_bytes(content)
    assert ledger.import_records(folder) == 1
    assert "broken.unreadable is unreadable" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["broken.unreadable"]
    assert ledger.import_records(folder) == 0


def test_nothing_is_removed_if_nothing_was_written(
    ledger: Ledger, folder: Path, tmp_path: Path
) -> None:
    path = put_down(folder, "a", JOB)
    (tmp_path / "ledger.db").rename(tmp_path / "moved")
    with pytest.raises(LedgerError, match="is gone"):
        ledger.import_records(folder)
    assert path.exists()


def test_a_worker_that_still_runs_keeps_its_records(ledger: Ledger, folder: Path) -> None:
    path = put_down(folder, "a", JOB)
    fd = os.open(folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(LedgerError, match="another worker uses"):
        ledger.import_records(folder)
    assert path.exists()
    os.close(fd)
    assert ledger.import_records(folder) == 1


def test_a_folder_that_is_none(ledger: Ledger, folder: Path) -> None:
    folder.write_text("")
    with pytest.raises(LedgerError, match="Not a directory; make the folder usable"):
        ledger.import_records(folder)


def test_a_file_that_cannot_be_removed_is_named(
    ledger: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_down(folder, "a", JOB)

    def refuse(_path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert ledger.import_records(folder) == 1
    assert "Permission denied; remove it by hand" in caplog.text
