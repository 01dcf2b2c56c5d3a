"""What outlives the agent: records of jobs, and the remains of those that died with it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, cast

import pytest

from worker import workspace
from worker.errors import SystemdError, WorkerError
from worker.leftovers import Records, Remains
from worker.master.wire import Job, JobResult
from worker.systemd.launcher import Launcher

JOB = Job.model_validate(
    {
        "id": "a/b",
        "sequence_number": 7,
        "node_id": "n",
        "retry_count": 2,
        "created_at": "2026-11-24T15:00:00.88228354Z",
        "parameters": {"bitrate": float("inf"), "x": ["\ud800", None, 1]},
        "queue": 17,
    }
)
RESULT = JobResult(job_id="a/b", node_id="n", status="completed", metrics={"frames": 3}, logs="ü")


def test_a_job_is_on_record_until_it_is_settled(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.accepted(JOB)
    [entry] = records.left()
    assert entry.job == JOB
    assert entry.result is None

    records.ended(JOB, RESULT)
    [entry] = records.left()
    assert entry.job == JOB
    assert entry.result == RESULT

    records.settled(JOB)
    assert records.left() == []
    assert list((tmp_path / "accepted").iterdir()) == []
    records.settled(JOB)
    records.close()


def test_a_new_acceptance_replaces_the_result_of_the_old_one(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.ended(JOB, RESULT)
    records.accepted(JOB.model_copy(update={"retry_count": 3}))
    [entry] = records.left()
    assert entry.job.retry_count == 3
    assert entry.result is None


def test_records_are_for_their_owner_only(tmp_path: Path) -> None:
    Records(tmp_path)
    assert (tmp_path / "accepted").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"{}", b'{"job": {"id": ""}}', b'{"job": 1}', b"\xff"]
)
def test_an_unreadable_record_is_named_and_dropped(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records(tmp_path)
    records.accepted(JOB)
    broken = tmp_path / "accepted/broken.json"
    broken.write_bytes(content)
    assert [entry.job for entry in records.left()] == [JOB]
    assert "broken.json" in caplog.text
    assert not broken.exists()


def test_a_half_written_record_is_none(tmp_path: Path) -> None:
    records = Records(tmp_path)
    (tmp_path / "accepted/x.part").write_text('{"job"')
    assert records.left() == []


def test_one_agent_at_a_time(tmp_path: Path) -> None:
    first = Records(tmp_path)
    with pytest.raises(WorkerError, match=r"another worker uses .*WORK_DIR"):
        Records(tmp_path)
    first.close()
    first.close()
    Records(tmp_path).close()


def test_a_work_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "accepted").write_text("")
    with pytest.raises(WorkerError, match="WORK_DIR"):
        Records(tmp_path)


def test_a_record_that_cannot_be_written_is_said_and_costs_no_job(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records(tmp_path)
    (tmp_path / "accepted").rmdir()
    records.accepted(JOB)
    assert "cannot be put on record" in caplog.text


class FakeLauncher:
    def __init__(self, *loaded: str) -> None:
        self.loaded = list(loaded)
        self.stopped: list[str] = []
        self.all_asked = asyncio.Event()
        self.expected = 0
        self.error: SystemdError | None = None

    async def leftovers(self) -> list[str]:
        return self.loaded

    async def stop_and_reap(self, unit: str) -> None:
        self.stopped.append(unit)
        if len(self.stopped) == self.expected:
            self.all_asked.set()
        await self.all_asked.wait()
        if self.error is not None:
            raise self.error


def remains(work_dir: Path, launcher: FakeLauncher, *jobs: Job) -> Remains:
    return Remains(work_dir, cast("Launcher", launcher), list(jobs))


async def test_units_of_jobs_on_record_or_with_a_folder_are_ended_at_once(tmp_path: Path) -> None:
    (tmp_path / "jobs/folder").mkdir(parents=True)
    ours = ["ffmpeg-job-folder.service", "ffmpeg-job-folder-probe.service"]
    ours.append("ffmpeg-job-recorded-input.service")
    launcher = FakeLauncher(*ours, "ffmpeg-job-foreign.service")
    launcher.expected = 3
    async with asyncio.timeout(5):  # one after the other would wait for ever
        left = remains(tmp_path, launcher, Job(id="recorded"))
        await left.clear()
    assert sorted(launcher.stopped) == sorted(ours)
    assert list((tmp_path / "jobs").iterdir()) == []
    assert left.run_by_others("foreign")
    assert not left.run_by_others("recorded")


async def test_a_folder_that_a_process_holds_is_left_alone(tmp_path: Path) -> None:
    held = workspace.Workspace.create(tmp_path / "jobs", "busy")
    launcher = FakeLauncher("ffmpeg-job-busy.service")
    left = remains(tmp_path, launcher)
    await left.clear()
    assert launcher.stopped == []
    assert held.path.is_dir()
    assert left.run_by_others("busy")
    held.remove()


async def test_a_unit_that_cannot_be_ended_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    launcher = FakeLauncher("ffmpeg-job-x.service")
    launcher.expected, launcher.error = 1, SystemdError("stuck in I/O")
    with caplog.at_level(logging.ERROR):
        await remains(tmp_path, launcher, Job(id="x")).clear()
    assert "ffmpeg-job-x.service: stuck in I/O" in caplog.text


async def test_nothing_left_says_nothing(tmp_path: Path, caplog: Any) -> None:
    await remains(tmp_path, FakeLauncher()).clear()
    assert caplog.records == []
