"""Jobs that an earlier agent left: each step is taken up where it is, and started once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.execution.theatre import BACKSTAGE, KILLED, Make, Scene, Theatre, finish
from worker.acceptance import boot_id
from worker.errors import LedgerError
from worker.execution import Execution
from worker.files import publish as publishing
from worker.systemd.names import Step


class Notes:
    """What outlives an agent; ``die_at`` names the step at whose note it dies."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, Any]] = {}
        self.die_at = ""
        self.full = False

    def recorded(self, step: Step) -> Mapping[str, Any] | None:
        return self.steps.get(step.value)

    async def starting(self, step: Step, unit: str, facts: Mapping[str, Any]) -> None:
        if self.full:
            raise LedgerError("the ledger is full")
        self.steps[step.value] = {"boot_id": boot_id(), **facts}
        if step.value == self.die_at:
            raise Died


class Died(BaseException):
    """The agent was killed: nothing of it runs any more."""


async def die(execution: Execution) -> None:
    """Run up to the death; the lock of the folder goes with the process."""
    with pytest.raises(Died):
        await execution.run()
    assert execution._workspace is not None
    execution._workspace.let_go()


def _die_at(step: str) -> Callable[[str], None]:
    def look(started: str) -> None:
        if started == step:
            raise Died

    return look


@pytest.mark.parametrize("step", ["input", "main", "probe"])
async def test_a_job_that_was_left_is_taken_up_where_it_is(
    make: Make, theatre: Theatre, tmp_path: Path, step: str
) -> None:
    notes, target = Notes(), tmp_path / "out.mp4"
    theatre.scenes[step].waits = True
    first = make({"output": str(target)}, records=notes)
    running = asyncio.create_task(first.run())
    await theatre.reached(step)
    first.leave()
    assert await asyncio.wait_for(running, 10) is None
    assert f"ffmpeg-job-j{BACKSTAGE.get(step, '.service')}" in theatre.loaded
    assert theatre.stopped == []

    theatre.scenes[step].waits = False
    for unit in theatre.units.values():
        unit._ended.set()
    result = await finish(make({"output": str(target)}, records=notes), theatre)
    assert (result.status, result.error) == ("completed", None)
    assert target.read_text() == "7 bytes"
    for once in ("input", "main"):
        assert theatre.steps.count(once) == 1
    assert result.metrics["input_generation_duration_sec"] == 2.0
    assert result.metrics["input_file_bytes"] == len("test input")


async def test_what_was_never_started_is_started_once(make: Make, theatre: Theatre) -> None:
    notes = Notes()
    notes.die_at = "main"
    await die(make(records=notes))
    assert theatre.steps == ["input"]
    notes.die_at = ""
    result = await finish(make(records=notes), theatre)
    assert result.status == "completed"
    assert theatre.steps == ["input", "main", "probe"]


async def test_what_is_gone_is_never_started_again(make: Make, theatre: Theatre) -> None:
    notes = Notes()
    theatre.on_start = _die_at("main")
    await die(make(records=notes))
    theatre.on_start = lambda step: None
    theatre.loaded.clear()
    result = await finish(make(records=notes), theatre)
    assert theatre.steps == ["input", "main"]
    assert result.error is not None
    assert result.error.startswith("platform_error: ffmpeg-job-j.service was started before")


async def test_after_a_reboot_nothing_is_started_again(make: Make, theatre: Theatre) -> None:
    notes = Notes()
    notes.die_at = "main"
    await die(make(records=notes))
    notes.steps["main"]["boot_id"] = "another"
    result = await finish(make(records=notes), theatre)
    assert theatre.steps == ["input"]
    assert result.error is not None
    assert "the machine was restarted" in result.error


async def test_what_is_published_is_not_published_again(
    make: Make, theatre: Theatre, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, target = Notes(), tmp_path / "out.mp4"
    publish = publishing.publish

    def die_after(staged: Path, target: Path, **more: Any) -> int:
        publish(staged, target, **more)
        raise Died

    monkeypatch.setattr("worker.jobfiles.publish", die_after)
    await die(make({"output": str(target)}, records=notes))
    monkeypatch.setattr("worker.jobfiles.publish", publish)
    result = await finish(make({"output": str(target)}, records=notes), theatre)
    assert (result.status, result.error) == ("completed", None)
    assert target.read_text() == "7 bytes"
    assert result.metrics["output_file_bytes"] == 7
    assert theatre.steps == ["input", "main", "probe", "probe"]
    assert theatre.launches[-1].argv[-1].endswith(str(target))


async def test_a_unit_is_judged_by_the_limits_it_was_started_with(
    make: Make, theatre: Theatre
) -> None:
    notes = Notes()
    theatre.on_start = _die_at("main")
    theatre.scenes["main"] = Scene(replace(KILLED, result="oom-kill"), output=None)
    await die(make({"resource_limits": {"max_memory_mb": 64}}, records=notes))
    theatre.on_start = lambda step: None
    result = await finish(make({"resource_limits": {"max_memory_mb": 999}}, records=notes), theatre)
    assert result.error is not None
    assert "memory limit of 64 MB exceeded" in result.error


async def test_nothing_starts_that_cannot_be_put_on_record(make: Make, theatre: Theatre) -> None:
    notes = Notes()
    notes.full = True
    result = await finish(make(records=notes), theatre)
    assert result.error == "platform_error: the ledger is full"
    assert theatre.launches == []
