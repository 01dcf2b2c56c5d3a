"""Jobs through the master, the service, systemd and ffmpeg, and what is reported of them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.conftest import WORK_DIR, Worker, parameters
from tests.fakes.master import FakeMaster
from tests.slowness import SLOWNESS


def run(master: FakeMaster, job: Any, extra: Any = None, timeout: float = 60) -> dict[str, Any]:
    """Submit a job; its result as the master got it."""
    job_id = master.submit(job, extra)["id"]
    master.wait(job_id, timeout)
    results = [result for result in master.results if result["job_id"] == job_id]
    assert len(results) == 1, "one acceptance, one result"
    return results[0]


def probe(path: Path) -> dict[str, Any]:
    text = subprocess.run(
        ["ffprobe", "-v", "error", "-show_format", "-show_streams", "-of", "json", str(path)],
        capture_output=True,
        check=True,
    ).stdout
    document: dict[str, Any] = json.loads(text)
    return document


def test_a_generated_job_reports_the_truth(
    worker: Worker, master: FakeMaster, tmp_path: Path
) -> None:
    worker.start(master)
    output = tmp_path / "out.mkv"
    job = {
        "scenario": "320x180p20-h265",
        "parameters": {"duration": 2, "bitrate": "300k", "output": str(output)},
    }

    result = run(master, job)

    assert result["status"] == "completed", result
    metrics = result["metrics"]
    media = probe(output)
    [video] = [stream for stream in media["streams"] if stream["codec_type"] == "video"]
    assert (video["codec_name"], video["width"], video["height"]) == ("hevc", 320, 180)
    assert metrics["frames_encoded"] == 40
    assert metrics["output_file_bytes"] == output.stat().st_size
    assert metrics["output_size_bytes"] == output.stat().st_size
    assert metrics["input_file_bytes"] == metrics["input_file_size_bytes"] > 0
    assert metrics["encoding_fps"] > 0
    assert 0 < metrics["cpu_seconds"] < 60
    assert 10e6 < metrics["memory_peak_bytes"] < 2e9
    assert metrics["io_write_bytes"] >= output.stat().st_size
    assert metrics["unit"].startswith("ffmpeg-job-")
    assert metrics["input_encoder_used"] == "libx264"
    assert output.stat().st_mode & 0o777 == 0o644
    assert not list(WORK_DIR.glob("input_*"))


def test_the_log_has_the_facts_that_the_guide_looks_for(worker: Worker, master: FakeMaster) -> None:
    worker.start(master)

    result = run(master, parameters(resource_limits={"max_memory_mb": 1024, "timeout_sec": 300}))

    assert result["status"] == "completed", result
    log = worker.log()
    for fact in (
        "Disk space: ",
        "% used",
        "MB available",
        "Resource limits: CPU=200%, Memory=1024MB, Disk=5000MB, Timeout=300s",
        "Process started with PID: ",
        f"/ffmpeg.slice/ffmpeg-default.slice/{result['metrics']['unit']}",
    ):
        assert fact in log, log
    assert Path("/var/log/ffmpeg-worker/worker.log").read_text().count("Resource limits") >= 1


def test_a_given_input_keeps_its_size_and_rate(
    worker: Worker, master: FakeMaster, make_media: Callable[..., Path], tmp_path: Path
) -> None:
    worker.start(master)
    source = make_media("in.mp4", seconds=2, size="200x100", rate=8)
    output = tmp_path / "out.webm"
    job = {
        "scenario": "1080p60-vp9",
        "parameters": {"input": str(source), "output": str(output), "bitrate": 200000},
    }

    result = run(master, job)

    assert result["status"] == "completed", result
    [video] = probe(output)["streams"]
    assert (video["codec_name"], video["width"], video["height"]) == ("vp9", 200, 100)
    assert result["metrics"]["frames_encoded"] == 16
    assert source.exists(), "a given input is never removed"


def test_a_job_over_its_memory_limit(worker: Worker, master: FakeMaster) -> None:
    worker.start(master)
    job = {
        "scenario": "1920x1080p30-h264",
        "parameters": {"duration": 3, "resource_limits": {"max_memory_mb": 32}},
    }

    result = run(master, job)

    assert result["status"] == "failed"
    assert result["metrics"]["failure_reason"] == "resource_error"
    assert result["error"].startswith("resource_error: memory limit of 32 MB exceeded")
    assert 30 * 2**20 < result["metrics"]["memory_peak_bytes"] <= 32 * 2**20
    assert result["metrics"]["cpu_seconds"] > 0


def test_the_memory_limit_holds_20_times_of_20(
    worker: Worker, master: FakeMaster, make_media: Callable[..., Path]
) -> None:
    worker.start(master)
    source = make_media("large.mp4", seconds=1, size="1920x1080", rate=30)
    limits = {"max_memory_mb": 40}

    jobs = [master.submit(parameters(input=str(source), resource_limits=limits)) for _ in range(20)]

    errors = [master.wait(job["id"], timeout=120).get("error") for job in jobs]
    expected = "resource_error: memory limit of 40 MB exceeded"
    assert [error for error in errors if not str(error).startswith(expected)] == []
    peaks = [result["metrics"]["memory_peak_bytes"] for result in master.results]
    assert len(peaks) == 20
    assert [peak for peak in peaks if not 38 << 20 < peak <= 40 << 20] == []


def test_a_job_over_its_time_limit(worker: Worker, master: FakeMaster) -> None:
    worker.start(master)
    job = {
        "scenario": "320x180p60-h265",
        "parameters": {
            "duration": 30 / SLOWNESS,
            "preset": "veryslow",
            "resource_limits": {"timeout_sec": 2},
        },
    }

    result = run(master, job)

    assert result["metrics"]["failure_reason"] == "timeout"
    assert result["error"].startswith("timeout: ")
    assert result["metrics"]["cpu_seconds"] > 0.5


BAD_INPUT: list[tuple[dict[str, Any], str, str]] = [
    ({"parameters": {"duration": "long"}}, "user_error", "duration"),
    ({"parameters": {"duration": -1}}, "user_error", "duration"),
    ({"parameters": {"bitrate": "fast"}}, "user_error", "bitrate"),
    ({"parameters": {"codec": "betamax"}}, "user_error", "codec"),
    ({"parameters": {"codec": "h264_vaapi"}}, "capability_mismatch", "h264_vaapi"),
    ({"parameters": {"preset": "warp"}}, "user_error", "preset"),
    ({"parameters": {"resource_limits": {"max_memory_mb": 0}}}, "user_error", "max_memory_mb"),
    ({"parameters": {"resource_limits": 7}}, "user_error", "resource_limits"),
    ({"parameters": {"resource_limits": {"max_disk_mb": 10**9}}}, "resource_error", "disk"),
    ({"parameters": {"input": "/tmp/no/file.mp4"}}, "input_error", "/tmp/no/file.mp4"),
    ({"parameters": {"input": "/tmp/folder"}}, "input_error", "/tmp/folder"),
    ({"parameters": {"input": "/tmp/text"}}, "input_error", "Invalid data"),
    ({"parameters": {"input": "/etc/passwd"}}, "user_error", "INPUT_DIRS"),
    ({"parameters": {"output": "/tmp/no/out.mp4"}}, "user_error", "/tmp/no"),
    ({"parameters": {"output": "/tmp/out.exe"}}, "user_error", ".exe"),
    ({"parameters": []}, "user_error", "parameters"),
    ({"scenario": 7}, "user_error", "scenario"),
    ({"engine": "gstreamer"}, "capability_mismatch", "gstreamer"),
]


def test_bad_input_fails_that_job_alone(worker: Worker, master: FakeMaster) -> None:
    worker.start(master)
    pid = worker.show("MainPID")
    Path("/tmp/folder").mkdir(exist_ok=True)
    Path("/tmp/text").write_text("no video")

    for changes, reason, words in BAD_INPUT:
        result = run(master, {"scenario": "160x120p10-h264"}, extra=changes)
        assert result["status"] == "failed", changes
        assert result["metrics"]["failure_reason"] == reason, changes
        assert result["error"].startswith(f"{reason}: "), changes
        assert words in result["error"], changes

    assert run(master, parameters())["status"] == "completed", "other jobs are not affected"
    assert worker.show("MainPID") == pid


def test_a_truncated_input_is_not_completed(
    worker: Worker, master: FakeMaster, make_media: Callable[..., Path], tmp_path: Path
) -> None:
    worker.start(master)
    whole = make_media("whole.mp4", seconds=20, size="320x240", rate=25)
    data = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", whole, "-c", "copy", "-movflags", "+faststart",
         "-f", "mp4", "-y", tmp_path / "fast.mp4"], check=True,
    )  # fmt: skip
    assert data.returncode == 0
    fast = (tmp_path / "fast.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(fast[: len(fast) // 4])
    output = tmp_path / "out.mp4"

    result = run(
        master, parameters(duration=None, input=str(tmp_path / "cut.mp4"), output=str(output))
    )

    assert result["status"] == "failed", result
    assert result["metrics"]["failure_reason"] == "input_error"
    assert not output.exists()


def test_a_backlog_is_not_paced_by_the_poll_interval(worker: Worker, master: FakeMaster) -> None:
    jobs = [master.submit(parameters()) for _ in range(20)]
    interval = min(3600, 300 * SLOWNESS)
    begun = time.monotonic()

    worker.start(master, POLL_INTERVAL=f"{interval:g}s")
    for job in jobs:
        assert master.wait(job["id"], timeout=240)["status"] == "completed"

    # One poll interval would be longer than all the jobs together.
    assert time.monotonic() - begun < interval


def test_hostile_ids_get_units_of_their_own(worker: Worker, master: FakeMaster) -> None:
    worker.start(master)
    ids = ["../../etc/passwd", "a b\n%n$HOME", "x", "x-input", "ü" * 400, "-rf"]

    results = [run(master, parameters(), extra={"id": job_id}) for job_id in ids]

    assert [result["status"] for result in results] == ["completed"] * len(ids)
    assert len({result["metrics"]["unit"] for result in results}) == len(ids)
    assert "\n%n" not in worker.log()


def test_a_failed_job_is_run_again_when_the_master_says_so(worker: Worker) -> None:
    with FakeMaster(max_retries=3) as master:
        worker.start(master)
        for route in ("POST /results", "GET /jobs/next"):
            master.fault(route, "lose")  # done, but the answer does not arrive
        job = master.submit(parameters(input="/etc/passwd"))

        assert master.wait(job["id"], timeout=60)["status"] == "failed"

        worker.stop()
        assert [result["status"] for result in master.results] == ["failed"] * 4


def test_sla_and_metrics_count_what_happened(worker: Worker, master: FakeMaster) -> None:
    worker.start(master)
    run(master, parameters(), extra={"classification": "production"})
    run(master, parameters(codec="betamax"))

    assert worker.metric("ffrtmp_worker_jobs_completed_total") == 1
    assert worker.metric("ffrtmp_worker_jobs_failed_total") == 1
    assert worker.metric("ffrtmp_worker_jobs_sla_compliant_total") == 1
    assert worker.metric("ffrtmp_worker_active_jobs") == 0
    assert worker.metric("ffrtmp_worker_total_inputs_generated") == 1
    assert worker.metric("ffrtmp_job_output_bytes_total") > 1000
    assert worker.metric("ffrtmp_worker_heartbeats_total") >= 1
    _, body = worker.get("/metrics")
    assert f'node_id="node-a:{19091}"' in body


def test_the_output_name_never_shows_a_partial_file(
    worker: Worker, master: FakeMaster, tmp_path: Path
) -> None:
    worker.start(master)
    output = tmp_path / "out.mp4"
    output.write_text("an older file")
    job = {
        "scenario": "320x180p60-h265",
        "parameters": {
            "duration": 30 / SLOWNESS,
            "preset": "veryslow",
            "output": str(output),
            "resource_limits": {"timeout_sec": 2},
        },
    }

    assert run(master, job)["status"] == "failed"
    assert output.read_text() == "an older file"
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
