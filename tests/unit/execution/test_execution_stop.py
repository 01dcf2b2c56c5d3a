"""A job that is stopped, by the agent or with the machine, at any moment."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.unit.execution.theatre import STOPPED, Make, Theatre, finish
from worker.files import publish as publishing
from worker.jobs.outcome import Intent


@pytest.mark.parametrize("state", ["stopping", "running"])
async def test_a_unit_that_ends_with_the_machine(make: Make, theatre: Theatre, state: str) -> None:
    """systemd stops it before it tells the worker to stop."""
    theatre.state = state
    theatre.scenes["main"].state = STOPPED
    execution = make()
    error = (await finish(execution, theatre)).error or ""
    assert ("the machine was shut down" in error) is (state == "stopping")
    intent = Intent.POWEROFF if state == "stopping" else Intent.NONE
    assert execution.steps.intent is intent


async def test_a_job_that_is_to_blame_itself_fails_during_a_shutdown_as_well(
    make: Make, theatre: Theatre
) -> None:
    theatre.state = "stopping"
    execution = make({"codec": "betamax"})
    assert ((await finish(execution, theatre)).error or "").startswith("user_error: ")
    assert execution.steps.intent is Intent.NONE


async def test_stopped_before_it_began(make: Make, theatre: Theatre) -> None:
    execution = make()
    execution.stop(Intent.SHUTDOWN)
    result = await finish(execution, theatre)
    assert result.error is not None
    assert "the worker was stopped" in result.error
    assert theatre.steps == []


@pytest.mark.parametrize("step", ["input", "main", "probe"])
async def test_stopped_while_a_unit_runs(make: Make, theatre: Theatre, step: str) -> None:
    theatre.scenes[step].waits = True
    execution = make()
    running = asyncio.create_task(finish(execution, theatre))
    await theatre.reached(step)
    await asyncio.sleep(0)
    execution.stop(Intent.CANCELLED)
    execution.stop(Intent.SHUTDOWN)  # the first word counts

    result = await running
    assert result.error == "platform_error: the job was cancelled"
    assert theatre.steps[-1] == step
    assert len(theatre.stopped) == 1


@pytest.mark.parametrize("step", ["input", "main", "probe"])
async def test_stopped_while_systemd_starts_a_unit(make: Make, theatre: Theatre, step: str) -> None:
    execution = make()
    theatre.scenes[step].waits = True

    def stop(started: str) -> None:
        if started == step:
            execution.stop(Intent.CANCELLED)

    theatre.on_start = stop
    result = await finish(execution, theatre)
    assert result.error == "platform_error: the job was cancelled"
    assert theatre.steps[-1] == step
    assert len(theatre.stopped) == 1


async def test_a_stop_that_comes_too_late_changes_nothing(
    make: Make, theatre: Theatre, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execution = make({"output": str(tmp_path / "out.mp4")})
    publish = publishing.publish

    def stop_and_publish(*args: Any, **more: Any) -> int:
        execution.stop(Intent.CANCELLED)
        return publish(*args, **more)

    monkeypatch.setattr("worker.jobfiles.publish", stop_and_publish)
    assert (await finish(execution, theatre)).status == "completed"
    assert (tmp_path / "out.mp4").exists()
