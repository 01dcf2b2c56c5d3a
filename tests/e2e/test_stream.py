"""Streams to a real RTMP server: what is sent arrives, and what does not is told."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Worker, job_cgroups, job_units, sh
from tests.e2e.rtmp import RtmpServer, Viewer
from tests.fakes.master import FakeMaster
from tests.slowness import SLOWNESS

SCENARIO = "160x120p10-h264"
SECRET = "hunter2"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RtmpServer]:
    with RtmpServer(tmp_path) as server:
        yield server


def submit(master: FakeMaster, **values: Any) -> str:
    # A live job that may last for minutes would be the only one that is taken.
    limits = {"timeout_sec": 120}
    parameters = {"output_mode": "rtmp", "duration": 5, "resource_limits": limits, **values}
    job = {"scenario": SCENARIO, "queue": "live", "parameters": parameters}
    job_id: str = master.submit(job)["id"]
    return job_id


def result_of(master: FakeMaster, job_id: str) -> dict[str, Any]:
    master.wait(job_id, timeout=30)
    [result] = [result for result in master.results if result["job_id"] == job_id]
    return result


def frames_in(path: Path) -> int:
    return int(
        sh(
            *("ffprobe", "-v", "error", "-count_frames", "-select_streams", "v:0"),
            *("-show_entries", "stream=nb_read_frames", "-of", "csv=p=0", str(path)),
        ).split(",")[0]
    )


def codecs_in(path: Path) -> list[str]:
    entries = ("-show_entries", "stream=codec_name", "-of", "csv=p=0")
    return sorted(sh("ffprobe", "-v", "error", *entries, str(path)).split())


def test_a_stream_is_seen_while_it_runs(
    worker: Worker, master: FakeMaster, server: RtmpServer, make_media: Callable[..., Path]
) -> None:
    worker.start(master)
    since = sh("journalctl", "-n", "0", "--show-cursor").rpartition("cursor: ")[2].strip()
    source = make_media("in.mp4", seconds=5, size="200x100", rate=8)
    viewer = Viewer(server.url(SECRET), 20)
    try:
        # The first goes where the master's host is, the second where it is told to.
        generated = submit(master, stream_key=SECRET, output_mode="stream")
        given = submit(master, input=str(source), rtmp_url=server.url("file"), duration=4.5)
        assert viewer.played() == 20
        assert master.job(generated)["status"] not in ("completed", "failed"), "it still runs"
    finally:
        viewer.close()

    result = result_of(master, generated)
    assert result["status"] == "completed", result
    metrics = result["metrics"]
    assert (
        metrics["frames"] == metrics["frames_encoded"] == frames_in(server.recorded(SECRET)) == 50
    )
    assert codecs_in(server.recorded(SECRET)) == ["aac", "h264"]
    assert metrics["output_size_bytes"] == pytest.approx(
        server.recorded(SECRET).stat().st_size, rel=0.1
    )
    assert metrics["fps"] == 10
    assert metrics["output_duration_sec"] == pytest.approx(5, abs=0.2)
    assert metrics["transcode_duration_sec"] > 4.5, "no faster than life"
    assert metrics["dropped_frames"] == 0
    assert metrics["bitrate_bps"] > 0
    assert metrics["cpu_seconds"] > 0
    assert "input_file_bytes" not in metrics
    assert metrics["unit"] == f"ffmpeg-job-{generated}.service"
    assert result["analyzer_output"]["output_mode"] == "rtmp"
    assert result["analyzer_output"]["stream_url"] == "rtmp://127.0.0.1:1935/live/***"

    second = result_of(master, given)
    assert second["status"] == "completed", second
    assert second["metrics"]["frames"] == frames_in(server.recorded("file")) == 36
    assert second["metrics"]["input_file_bytes"] == source.stat().st_size

    assert SECRET not in json.dumps(result)
    sh("journalctl", "--sync")
    journal = sh("journalctl", "-o", "export", "--all", f"--after-cursor={since}")
    told = [line for line in journal.splitlines() if SECRET in line]
    # The command line is there for all to see as long as the process runs.
    assert [line for line in told if not line.startswith("_CMDLINE=")] == []
    assert "streaming to rtmp://127.0.0.1:1935/live/***" in worker.log()


def test_a_stream_that_is_not_taken_or_too_long(
    worker: Worker, master: FakeMaster, server: RtmpServer
) -> None:
    limit = 1 + round(SLOWNESS)  # ffmpeg takes a part of it to start
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes the call, and says nothing
        worker.start(master, MAX_CONCURRENT_JOBS="5")
        begun = time.monotonic()
        jobs = {
            "deaf": f"rtmp://127.0.0.1:{deaf.getsockname()[1]}/live",
            "dead": "rtmp://127.0.0.1:9/live",
            "wrong application": server.url("", "wrong"),
            "publishing is refused": server.url("", "closed"),
        }
        asked = {
            what: submit(master, rtmp_url=url, stream_key=SECRET) for what, url in jobs.items()
        }
        endless = submit(master, duration=60, resource_limits={"timeout_sec": limit})
        results = {what: result_of(master, job_id) for what, job_id in asked.items()}
        assert time.monotonic() - begun < 20 * SLOWNESS

    stopped = result_of(master, endless)
    assert stopped["error"].startswith(f"timeout: time limit of {limit} s exceeded")
    assert 0 < stopped["metrics"]["output_duration_sec"] < limit + 1
    for what, result in results.items():
        assert result["status"] == "failed", what
        start = "network_error: ffmpeg could not send the stream"
        assert result["error"].startswith(start), (what, result["error"])
        assert SECRET not in json.dumps(result)
    assert "Connection refused" in results["dead"]["error"], "for this a master tries again"
    assert results["deaf"]["metrics"]["transcode_duration_sec"] > 9


def test_a_server_that_dies_in_the_middle(
    worker: Worker, master: FakeMaster, server: RtmpServer
) -> None:
    worker.start(master)
    viewer = Viewer(server.url("cut"), 10)
    try:
        job_id = submit(master, stream_key="cut", duration=60)
        assert viewer.played() == 10
    finally:
        viewer.close()
    server.kill()
    begun = time.monotonic()
    result = result_of(master, job_id)
    assert time.monotonic() - begun < 10 * SLOWNESS
    assert result["error"].startswith("network_error: ffmpeg could not send the stream")
    assert result["metrics"]["frames"] >= 10
    assert job_units() == []
    assert job_cgroups() == []
