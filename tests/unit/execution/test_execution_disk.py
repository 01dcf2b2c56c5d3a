"""Disk space: what a job may need, and a disk that is full or fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.unit.execution.theatre import FAILED, Make, Scene, Theatre, finish
from worker.errors import JobError, Reason
from worker.node import disk
from worker.node.disk import DiskUsage


async def test_disk_space_that_cannot_be_seen(
    make: Make, theatre: Theatre, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> DiskUsage:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk, "usage", fail)
    result = await asyncio.wait_for(make().run(), 10)
    assert result is not None
    assert result.error is not None
    assert result.error.startswith("platform_error: cannot see how much disk space")
    assert "Input/output error" in result.error


async def test_a_disk_limit_that_does_not_fit(
    make: Make, theatre: Theatre, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "usage", lambda folder: DiskUsage(10 * 2**20, 0, 10 * 2**20))
    result = await asyncio.wait_for(make({"resource_limits": {"max_disk_mb": 11}}).run(), 10)
    assert result is not None
    assert result.error is not None
    assert result.error.startswith("resource_error: the job may need 11 MB of disk, but only 10 MB")


async def test_a_disk_that_is_full_when_ffmpeg_fails(
    make: Make, theatre: Theatre, monkeypatch: pytest.MonkeyPatch
) -> None:
    theatre.scenes["main"] = Scene(FAILED, log="", output=None)
    full = DiskUsage(2**30, 2**30, 0)
    execution = make()
    theatre.on_start = lambda step: (
        monkeypatch.setattr(disk, "usage", lambda folder: full) if step == "main" else None
    )
    error = (await finish(execution, theatre)).error or ""
    assert error.startswith("resource_error: no space is left in ")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(28, "No space left on device"), "resource_error"),
     (OSError(5, "Input/output error"), "platform_error"),
     (JobError(Reason.RESOURCE_ERROR, "full"), "resource_error")],
)  # fmt: skip
async def test_a_disk_that_fails_while_publishing(
    make: Make, theatre: Theatre, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str,
) -> None:  # fmt: skip
    def fail(*args: Any, **more: Any) -> int:
        raise error

    monkeypatch.setattr("worker.jobfiles.publish", fail)
    result = await finish(make({"output": str(tmp_path / "out.mp4")}), theatre)
    assert result.error is not None
    assert result.error.startswith(f"{reason}: ")
