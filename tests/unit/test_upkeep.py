"""Beside the jobs: what makes the work directory unusable, gauges, old entries and files."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.fakes.attachments import FakeBus
from worker import upkeep as module
from worker.config import Settings
from worker.dispatch import Dispatcher
from worker.errors import BusGone
from worker.ledger import Ledger
from worker.node.disk import DiskUsage
from worker.systemd.launcher import Launcher
from worker.telemetry.metrics import Metrics
from worker.telemetry.notify import Notifier
from worker.upkeep import Upkeep, remove_old_files

DAY = 86400


class Told(Notifier):
    def __init__(self) -> None:
        super().__init__({})
        self.lines: list[str] = []

    def status(self, status: str) -> None:
        self.lines.append(status)


class Bench:
    def __init__(self, folder: Path) -> None:
        (folder / "jobs").mkdir()
        self.folder = folder
        self.ledger = Ledger.open(folder / "ledger.db")
        self.metrics = Metrics("node", 1)
        self.bus = FakeBus()
        self.told = Told()
        self.reasons: list[str] = []
        self.upkeep = Upkeep(
            Settings(work_dir=folder, history_days=7),
            self.told,
            self.metrics,
            cast("Launcher", SimpleNamespace(bus=self.bus)),
            self.ledger,
            lambda: self.reasons,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.ledger.close()


@pytest.mark.parametrize(("used", "full"), [(949, False), (950, True), (1000, True)])
def test_a_full_disk(bench: Bench, monkeypatch: pytest.MonkeyPatch, used: int, full: bool) -> None:
    usage = DiskUsage(1000, used, 1000 - used)
    monkeypatch.setattr("worker.node.disk.usage", lambda path: usage)
    assert ("full" in " ".join(bench.upkeep.unusable())) is full


def test_a_work_directory_that_is_read_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.upkeep.unusable() == []
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "not writable" in bench.upkeep.unusable()[0]


def test_a_ledger_that_cannot_be_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.ledger, "check", lambda: "the ledger is read-only")
    assert bench.upkeep.unusable() == ["the ledger is read-only"]


async def test_the_status_line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATUS_PAUSE_SECONDS", 0.0)
    dispatcher = SimpleNamespace(running={"a": None}, slots=4, reports=[], changed=asyncio.Event())
    task = asyncio.create_task(bench.upkeep.status(cast("Dispatcher", dispatcher)))

    async def said(line: str) -> None:
        dispatcher.changed.set()
        async with asyncio.timeout(5):
            while line not in bench.told.lines:
                await asyncio.sleep(0)

    await said("ready, 1 of 4 slots in use")
    dispatcher.reports += ["a", "b"]
    await said("ready, 1 of 4 slots in use, 2 results not delivered")
    bench.reasons.append("draining")
    await said("1 of 4 slots in use, 2 results not delivered; taking no jobs: draining")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(bench.told.lines) == 3, "only what is new is said"


async def test_the_status_line_tells_many_changes_at_once(bench: Bench) -> None:
    dispatcher = SimpleNamespace(running={}, slots=4, reports=[], changed=asyncio.Event())
    task = asyncio.create_task(bench.upkeep.status(cast("Dispatcher", dispatcher)))
    begun = time.monotonic()
    async with asyncio.timeout(5):
        while len(bench.told.lines) < 2:
            dispatcher.running[str(len(dispatcher.running))] = None
            dispatcher.changed.set()
            await asyncio.sleep(0.01)
    assert time.monotonic() - begun >= module.STATUS_PAUSE_SECONDS
    assert bench.told.lines[-1] == f"ready, {len(dispatcher.running)} of 4 slots in use"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_is_attached_is_counted_also_after_systemd_was_away(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ATTACHMENTS_SECONDS", 0.0)
    counted: list[frozenset[str]] = []
    monkeypatch.setattr(bench.metrics, "set_attached", counted.append)
    bench.bus.attached = [["a.scope"], BusGone("gone"), ["a.scope", "b.scope"], []]
    counting = asyncio.create_task(bench.upkeep.attached())
    async with asyncio.timeout(5):
        while [] not in map(list, counted):
            await asyncio.sleep(0)
    counting.cancel()
    assert counted[:3] == [{"a.scope"}, {"a.scope", "b.scope"}, frozenset()]


def test_old_files_of_ours_go_and_no_others(tmp_path: Path) -> None:
    old = time.time() - 8 * DAY
    for name in ("input_a.mp4", "job_a_output.mkv", "notes.txt", "ledger.db"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (old, old))
    for name in ("input_b.mp4", "job_b_output.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "input_dir").mkdir()
    os.utime(tmp_path / "input_dir", (old, old))
    remove_old_files(tmp_path, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "input_b.mp4", "input_dir", "job_b_output.mp4", "ledger.db", "notes.txt",
    ]  # fmt: skip
