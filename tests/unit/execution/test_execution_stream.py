"""Jobs that stream: one step, no output, and a key that is told to nobody."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.execution.theatre import FAILED, KILLED, PROGRESS, Make, Scene, Theatre, finish
from worker.node import disk
from worker.node.disk import DiskUsage

STREAM = {"output_mode": "rtmp", "stream_key": "hunter2", "duration": 10}


async def test_the_way_of_a_stream(
    make: Make, theatre: Theatre, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(disk, "usage", lambda folder: DiskUsage(2**20, 2**20, 0))
    theatre.scenes["main"] = Scene(stdout="total_size=5000\n" + PROGRESS, log="")
    execution = make(
        STREAM | {"resource_limits": {"max_disk_mb": 1}}, master_url="https://[fd00::1]:8443/m"
    )
    assert execution.progress_text() == "streaming: starting"
    result = await finish(execution, theatre)

    assert (result.status, result.error) == ("completed", None)
    assert theatre.steps == ["main"], "nothing is generated, nothing is probed"
    [launch] = theatre.launches
    assert launch.argv[-1] == "rtmp://[fd00::1]:1935/live"
    assert theatre.secrets == ["rtmp_app=live\nrtmp_playpath=hunter2\n"]
    assert launch.sandbox is not None
    assert launch.sandbox.network
    assert launch.limits.file_bytes == 2048 * 2**20, "its log is none of the job's disk limit"
    assert result.metrics is not None
    assert result.metrics["output_size_bytes"] == 5000
    assert result.metrics["frames"] == 300
    assert "input_file_bytes" not in result.metrics
    assert execution.progress_text() == "streaming: frame 300, 150 fps, speed 5.00x, 100 %"
    assert [path.name for path in (tmp_path / "work").rglob("*") if path.is_file()] == []
    told = result.model_dump_json() + caplog.text + launch.description + str(launch.journal_fields)
    assert "streaming to rtmp://[fd00::1]:1935/live/***" in told
    assert "hunter2" not in told
    assert "level+quiet" in launch.argv


async def test_what_is_streamed_cannot_be_swapped(
    make: Make, theatre: Theatre, tmp_path: Path
) -> None:
    folder = tmp_path / "everybodys"
    folder.mkdir()
    folder.chmod(0o777)
    source = folder / "in.mp4"
    source.write_text("video")
    await finish(make(STREAM | {"input": str(source), "rtmp_url": "rtmp://h/app"}), theatre)
    [launch] = theatre.launches
    assert launch.sandbox is not None
    given = tmp_path / "work/jobs/j/given.mp4"
    assert given in launch.sandbox.readable
    assert source not in launch.sandbox.readable
    assert f"file:{given}" in launch.argv


async def test_a_given_file_is_streamed(make: Make, theatre: Theatre, tmp_path: Path) -> None:
    source = tmp_path / "in.mp4"
    source.write_text("video")
    theatre.scenes["main"] = Scene(FAILED, log=f"[error] file:{source}: Input/output error\n")
    parameters = STREAM | {"input": str(source), "rtmp_url": "rtmp://h/app"}
    result = await finish(make(parameters), theatre)
    assert theatre.launches[0].argv[-1] == "rtmp://h/app"
    assert theatre.secrets == ["rtmp_app=app\nrtmp_playpath=hunter2\n"]
    assert result.error is not None
    assert result.error.startswith("runtime_error: "), "it is not the network's fault"
    assert result.metrics is not None
    assert result.metrics["input_file_bytes"] == 5


@pytest.mark.parametrize(
    ("scene", "reason", "words"),
    [
        (Scene(stdout=PROGRESS.replace("10000000", "7900000"), log=""),
         "runtime_error", "7.90 s of the 10.00 s"),
        (Scene(stdout="", log=""), "runtime_error", "no frame was sent"),
        (Scene(FAILED, stdout="", log="[error] [rtmp] Server error: hunter2 is taken"),
         "network_error", "*** is taken"),
        (Scene(log="[error] Error writing trailer of rtmp://master:1935/live/hunter2: Broken pipe"),
         "network_error", "live/***: Broken pipe"),
        (Scene(replace(KILLED, result="timeout", exec_main_exit_usec=4_000_000_000), log=""),
         "timeout", "time limit"),
    ],
)  # fmt: skip
async def test_a_stream_that_fails(
    make: Make, theatre: Theatre, caplog: pytest.LogCaptureFixture,
    scene: Scene, reason: str, words: str,
) -> None:  # fmt: skip
    theatre.scenes["main"] = scene
    result = await finish(make(STREAM, master_url="http://master:8080"), theatre)
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.startswith(f"{reason}: ")
    assert words in result.error
    assert "hunter2" not in result.model_dump_json() + caplog.text


async def test_a_stream_without_a_master_needs_a_url(make: Make, theatre: Theatre) -> None:
    result = await asyncio.wait_for(make(STREAM).run(), 10)
    assert result is not None
    assert result.error is not None
    assert result.error.startswith("user_error: parameters.rtmp_url: must be given")
    assert theatre.steps == []
