"""What an agent finds of its predecessor, and what it does with it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import cast

import pytest

from worker.acceptance import boot_id
from worker.ledger import Ledger, State
from worker.master.wire import Job, JobResult
from worker.recovery import Recovery, sort_out
from worker.systemd.launcher import Launcher

UNIT = "ffmpeg-job-a.service"


@pytest.fixture(autouse=True)
def _jobs(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()


class FakeLauncher:
    def __init__(self, *loaded: str) -> None:
        self.loaded = set(loaded)

    async def leftovers(self) -> list[str]:
        return sorted(self.loaded)

    async def stop_and_reap(self, unit: str) -> None:
        self.loaded.discard(unit)

    def sweep(self, loaded: Collection[str]) -> None:
        assert set(loaded) == self.loaded


def result() -> JobResult:
    return JobResult(job_id="a", node_id="n", status="completed")


@pytest.mark.parametrize(
    ("boot", "loaded", "output", "way"),
    [
        (boot_id(), True, True, "begun"),
        (boot_id(), True, False, "begun"),
        (boot_id(), False, True, "begun"),
        (boot_id(), False, False, "unstarted"),
        ("another", False, False, "begun"),
        ("another", False, True, "begun"),
    ],
)
def test_a_unit_that_was_about_to_start(
    ledger: Ledger, tmp_path: Path, boot: str, loaded: bool, output: bool, way: str
) -> None:
    entry = ledger.accept(Job(id="a"))
    ledger.starting(entry.id, "main", UNIT, {"boot_id": boot})
    if output:
        (tmp_path / "jobs/a").mkdir()
        (tmp_path / "jobs/a/main.out").touch()
    found = sort_out(ledger.unreaped(), [UNIT] if loaded else [], tmp_path)
    assert [name for name in ("begun", "unstarted", "owed", "settled") if getattr(found, name)] == [
        way
    ]
    assert found.foreign == []


def test_the_other_states(ledger: Ledger, tmp_path: Path) -> None:
    accepted, finished, settled = (ledger.accept(Job(id=name)) for name in "abc")
    for entry in (finished, settled):
        ledger.finish(entry.id, result(), {})
    ledger.settle(settled.id, "delivered")
    found = sort_out(ledger.unreaped(), ["ffmpeg-job-b-probe.service", "ffmpeg-job-x.service"],
                     tmp_path)  # fmt: skip
    assert [entry.job.id for entry in found.unstarted] == ["a"]
    assert [entry.job.id for entry in found.owed] == ["b"]
    assert [entry.job.id for entry in found.settled] == ["c"]
    assert found.begun == []
    assert found.foreign == ["ffmpeg-job-x.service"]
    assert accepted.state is State.ACCEPTED


def test_a_second_unit_means_that_the_first_has_run(ledger: Ledger, tmp_path: Path) -> None:
    entry = ledger.accept(Job(id="a"))
    for step in ("input", "main"):
        ledger.starting(entry.id, step, UNIT, {"boot_id": boot_id()})
    assert sort_out(ledger.unreaped(), [], tmp_path).begun != []


async def test_settled_ones_are_put_away_and_strangers_left_alone(
    ledger: Ledger, tmp_path: Path
) -> None:
    for name in ("a", "x", "y", "nobody"):
        (tmp_path / "jobs" / name).mkdir()
        (tmp_path / "jobs" / name / "main.out").touch()
    entry = ledger.accept(Job(id="a"))
    ledger.finish(entry.id, result(), {})
    ledger.settle(entry.id, "delivered")
    strangers = {"ffmpeg-job-x.service", "ffmpeg-job-y-input.service"}
    launcher = FakeLauncher(UNIT, *strangers)
    recovery = Recovery(ledger, cast("Launcher", launcher), tmp_path)
    found = await recovery.look()
    await recovery.put_away(found.settled)
    assert launcher.loaded == strangers
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == ["x", "y"]
    assert ledger.unreaped() == []
    assert recovery.run_by_others("x")
    assert not recovery.run_by_others("a")


async def test_of_two_acceptances_of_a_job_only_the_last_counts(
    ledger: Ledger, tmp_path: Path
) -> None:
    """As after a disk that was full when the first one ended: they share unit and folder."""
    first = ledger.accept(Job(id="a"))
    ledger.starting(first.id, "main", UNIT, {"boot_id": boot_id()})
    second = ledger.accept(Job(id="a", retry_count=1))
    ledger.starting(second.id, "main", UNIT, {"boot_id": boot_id()})
    other = ledger.accept(Job(id="b"))
    recovery = Recovery(ledger, cast("Launcher", FakeLauncher(UNIT)), tmp_path)
    found = await recovery.look()
    assert [entry.id for entry in found.begun] == [second.id]
    assert [entry.id for entry in found.unstarted] == [other.id]
    assert found.settled == []
    dropped = next(entry for entry in ledger.recent(9) if entry.id == first.id)
    assert (dropped.state, dropped.why) == (State.REAPED, "the job was handed out anew")
