"""The files that systemd leaves of units with extra journal fields."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from worker.systemd.fieldfiles import FieldFiles


def file_of(folder: Path, unit: str) -> Path:
    path = folder / f"log-extra-fields:{unit}"
    path.touch()
    return path


async def test_a_file_goes_after_a_while(tmp_path: Path) -> None:
    files = FieldFiles(tmp_path, delay=0.01)
    mine, other = file_of(tmp_path, "a.service"), file_of(tmp_path, "b.service")
    files.unit_gone("a.service")
    async with asyncio.timeout(5):
        while mine.exists():
            await asyncio.sleep(0.01)
    assert other.exists()


async def test_a_new_unit_of_that_name_keeps_its_own(tmp_path: Path) -> None:
    files = FieldFiles(tmp_path, delay=3600)
    mine = file_of(tmp_path, "a.service")
    files.unit_gone("a.service")
    files.unit_wanted("a.service")
    files.close()
    assert mine.exists()


async def test_closing_removes_what_is_due(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    files = FieldFiles(tmp_path, delay=3600)
    mine = file_of(tmp_path, "a.service")
    (tmp_path / "log-extra-fields:folder").mkdir()
    for unit in ("a.service", "none.service", "folder"):
        files.unit_gone(unit)
    files.close()
    assert not mine.exists()
    assert "of folder stays" in caplog.text


async def test_a_sweep_removes_what_a_killed_agent_has_left(tmp_path: Path) -> None:
    files = FieldFiles(tmp_path, delay=0.01)
    old, loaded, foreign, again = (
        file_of(tmp_path, name)
        for name in (
            "ffmpeg-job-a.service", "ffmpeg-job-b.service", "other.service", "ffmpeg-job-c.service"
        )
    )  # fmt: skip
    files.sweep({"ffmpeg-job-b.service"})
    files.unit_wanted("ffmpeg-job-c.service")  # started meanwhile
    async with asyncio.timeout(5):
        while old.exists():
            await asyncio.sleep(0.01)
    assert all(path.exists() for path in (loaded, foreign, again))
