"""Executions whose launcher is a theatre."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.unit.execution.theatre import Make, Theatre
from worker.acceptance import StepRecords
from worker.config import Settings
from worker.diskwatch import DiskWatch
from worker.execution import Execution
from worker.jobs.capabilities import TYPICAL
from worker.master.wire import Job
from worker.node import disk
from worker.node.disk import DiskUsage
from worker.programs import Programs
from worker.site import Site
from worker.systemd.launcher import Launcher
from worker.systemd.sandbox import JobRoot


@pytest.fixture
def theatre(monkeypatch: pytest.MonkeyPatch) -> Theatre:
    plenty = DiskUsage(total=2**50, used=0, available=2**50)
    monkeypatch.setattr(disk, "usage", lambda folder: plenty)
    theatre = Theatre()
    monkeypatch.setattr("worker.steps.adopt", lambda _launcher, launch: theatre.adopt(launch))
    return theatre


@pytest.fixture
def disk_watch() -> Iterator[DiskWatch]:
    watch = DiskWatch()
    yield watch
    watch.close()


@pytest.fixture
def make(theatre: Theatre, tmp_path: Path, disk_watch: DiskWatch) -> Make:
    def make(
        parameters: Any = None,
        programs: Programs | None = None,
        records: StepRecords | None = None,
        **more: Any,
    ) -> Execution:
        (tmp_path / "work").mkdir(exist_ok=True)
        more = {"input_dirs": (tmp_path,), "output_dirs": (tmp_path,), **more}
        settings = Settings(work_dir=tmp_path / "work", node_name="node", **more)
        root = JobRoot(tmp_path / "work/root", ("/usr",))
        job = Job(id="j", scenario="640x360p30-h264", parameters=parameters or {})
        return Execution(
            job,
            node_id="n",
            launcher=cast("Launcher", theatre),
            capabilities=TYPICAL,
            programs=programs or Programs("/usr/bin/ffmpeg", "/usr/bin/ffprobe"),
            settings=settings,
            site=Site(root, settings.policy),
            disk=disk_watch,
            records=records,
        )

    return make
