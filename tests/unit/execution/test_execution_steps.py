"""One job through its units: the way of each step, and how each may fail."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from tests.unit.execution.theatre import FAILED, KILLED, PROGRESS, Make, Scene, Theatre, finish
from worker import workspace
from worker.errors import SystemdError
from worker.execution import Execution
from worker.jobs.outcome import Intent
from worker.programs import Programs
from worker.systemd.state import UnitState
from worker.systemd.usage import Usage


async def test_the_way_of_a_job(make: Make, theatre: Theatre, tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    execution = make({"output": str(target)})
    result = await finish(execution, theatre)

    assert (result.status, result.error) == ("completed", None)
    assert theatre.steps == ["input", "main", "probe"]
    assert target.read_text() == "7 bytes"
    assert result.metrics is not None
    figures = {
        "frames_encoded": 300, "output_file_bytes": 7, "input_file_bytes": len("test input"),
        "cpu_seconds": 2.0, "memory_peak_bytes": 57420 * 1024, "transcode_duration_sec": 2.0,
        "io_read_bytes": 4321, "io_write_bytes": 7000, "unit": "ffmpeg-job-j.service",
    }  # fmt: skip
    assert {key: result.metrics[key] for key in figures} == figures
    assert "verbose" not in (result.logs or "")


async def test_the_folder_is_held_until_the_report_has_arrived(
    make: Make, theatre: Theatre, tmp_path: Path
) -> None:
    execution = make()
    await execution.run()
    assert list(workspace.abandoned(tmp_path / "work/jobs")) == []
    assert (tmp_path / "work/jobs/j").is_dir()
    execution.close()
    assert not (tmp_path / "work/jobs/j").exists()


async def test_memory_is_never_above_its_limit(make: Make, theatre: Theatre) -> None:
    # ffmpeg's own figure counts shared libraries, which others may have paid for.
    result = await finish(make({"resource_limits": {"max_memory_mb": 24}}), theatre)
    assert result.metrics is not None
    assert result.metrics["memory_peak_bytes"] == 24 * 2**20


@pytest.mark.parametrize(
    ("step", "scene", "reason", "words", "steps"),
    [
        ("input", Scene(FAILED, log="[error] boom"), "runtime_error", "generating the input", 1),
        ("input", Scene(output=None), "runtime_error", "no test input", 1),
        ("main", Scene(FAILED, log="[error] a: Invalid data found when processing input"),
         "input_error", "Invalid data", 2),
        ("main", Scene(KILLED, usage=Usage(oom_kills=1, memory_limit_hits=1)),
         "resource_error", "memory limit of 2048 MB", 2),
        ("main", Scene(output=None), "runtime_error", "left no output", 2),
        ("main", Scene(SystemdError("lost")), "platform_error", "lost", 2),
        ("main", Scene(RuntimeError("bug")), "platform_error", "internal error", 2),
        ("main", Scene(UnitState(load_state="not-found")), "platform_error", "lost the unit", 2),
        ("probe", Scene(FAILED, stdout="", log="", output=None), "runtime_error", "ffprobe", 3),
        ("probe", Scene(stdout="{}", log="", output=None), "runtime_error", "video stream", 3),
        ("probe", Scene(KILLED, log="", output=None, usage=Usage(oom_kills=1)),
         "resource_error", "probing the output failed", 3),
        ("probe", Scene(SystemdError("refused"), log="", output=None),
         "platform_error", "refused", 3),
    ],
)  # fmt: skip
async def test_every_step_may_fail(
    make: Make, theatre: Theatre, tmp_path: Path,
    step: str, scene: Scene, reason: str, words: str, steps: int,
) -> None:  # fmt: skip
    theatre.scenes[step] = scene
    target = tmp_path / "out.mp4"
    result = await finish(make({"output": str(target)}), theatre)

    assert result.status == "failed"
    assert result.error is not None
    assert result.error.startswith(f"{reason}: ")
    assert words in result.error
    assert len(theatre.steps) == steps
    assert not target.exists()


async def test_a_failed_step_tells_what_it_used(make: Make, theatre: Theatre) -> None:
    used = Usage(cpu_seconds=1.5, memory_peak_bytes=5, io_read_bytes=6, io_write_bytes=1)
    theatre.scenes["main"] = Scene(KILLED, log="", usage=used)
    result = await finish(make(), theatre)
    assert result.metrics is not None
    assert result.metrics["cpu_seconds"] == 1.5
    assert result.metrics["io_write_bytes"] == len("7 bytes"), "what a killed ffmpeg left"

    theatre.scenes["input"] = Scene(KILLED, log="", usage=used)
    result = await finish(make(), theatre)
    assert result.metrics is not None
    assert result.metrics["unit"] == "ffmpeg-job-j-input.service"
    assert result.metrics["cpu_seconds"] == 1.5
    assert "transcode_duration_sec" not in result.metrics


async def test_a_node_without_ffmpeg(make: Make, theatre: Theatre) -> None:
    result = await finish(make(programs=Programs("", "/usr/bin/ffprobe")), theatre)
    assert result.error is not None
    assert result.error.startswith("platform_error: ffmpeg not found")
    assert theatre.steps == []


async def test_systemd_refuses(make: Make, theatre: Theatre) -> None:
    theatre.refusal = SystemdError("StartTransientUnit: no", "org.x")
    result = await finish(make(), theatre)
    assert result.error == "platform_error: StartTransientUnit: no"


async def test_a_unit_that_cannot_be_reaped_is_named(
    make: Make, theatre: Theatre, caplog: pytest.LogCaptureFixture
) -> None:
    for error in (SystemdError("stuck"), RuntimeError("bug")):
        theatre.reap_error = error
        result = await finish(make(), theatre)
        assert result.status == "completed"
    assert "ffmpeg-job-j.service is left over: stuck" in caplog.text
    assert "clean-up failed" in caplog.text


@pytest.mark.parametrize("persist", [False, True])
async def test_what_is_kept(make: Make, theatre: Theatre, tmp_path: Path, persist: bool) -> None:
    await finish(make(persist_inputs=persist, persist_outputs=persist), theatre)
    kept = {path.name for path in (tmp_path / "work").iterdir() if path.is_file()}
    assert kept == ({"input_j.mp4", "job_j_output.mp4"} if persist else set())


async def test_no_secret_of_a_url_is_told(
    make: Make, theatre: Theatre, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = "http://user:hunter2@h/x.mp4?token=hunter3"
    theatre.scenes["main"] = Scene(FAILED, log=f"[info] {url}\n[error] {url}: Connection refused\n")
    execution = make({"input": url})
    result = await finish(execution, theatre)
    assert result.error is not None
    assert result.error.startswith("network_error: ")
    [launch] = theatre.launches
    told = result.model_dump_json() + caplog.text + launch.description + str(launch.journal_fields)
    assert "hunter" not in told
    assert "level+quiet" in launch.argv, "standard error goes to the journal"


async def test_progress_is_told_and_logged(
    make: Make, theatre: Theatre, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.following.SAMPLE_SECONDS", 0.01)
    told: list[str] = []
    execution = make()
    seen = asyncio.Event()

    def show(shown: Execution) -> None:
        told.append(shown.progress_text())
        seen.set()

    execution._on_progress = show
    theatre.scenes["main"] = Scene(waits=True, stdout=PROGRESS.replace("end", "continue"))
    assert execution.progress_text() == "generating the input: starting"
    running = asyncio.create_task(execution.run())
    await asyncio.wait_for(seen.wait(), 10)
    execution.stop(Intent.CANCELLED)
    await running
    assert told[0] == "transcoding: frame 300, 150 fps, speed 5.00x, 100 %"
    execution.close()
