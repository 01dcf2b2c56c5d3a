from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from worker.errors import Reason
from worker.jobs.capabilities import TYPICAL
from worker.jobs.outcome import COMPLETED, Outcome
from worker.jobs.parse import parse_job
from worker.jobs.probe import Media
from worker.jobs.progress import Progress
from worker.jobs.report import MAX_LOG_BYTES, JobRun, build_result
from worker.jobs.sla import Sla, sla
from worker.jobs.spec import Limits
from worker.jobs.streams import sent_media
from worker.master.wire import Job

T0 = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
JOB = Job(
    id="j1",
    scenario="720p30-h264",
    parameters={"duration": 10},
    created_at="2026-11-24T12:00:00Z",
    started_at="2026-11-24T12:00:05Z",
)


@dataclass
class Used:
    cpu_seconds: float | None = 3.5
    memory_peak_bytes: int | None = 1000
    io_read_bytes: int | None = 10
    io_write_bytes: int | None = 20
    oom_kills: int | None = None
    memory_limit_hits: int | None = None
    task_limit_hits: int | None = None
    cpu_stall_seconds: float | None = 1.25
    memory_stall_seconds: float | None = 0.0
    io_stall_seconds: float | None = None


RUN = JobRun(
    job=JOB,
    node_id="n1",
    node_name="worker-1",
    started_at=T0 + timedelta(seconds=6),
    ended_at=T0 + timedelta(seconds=20),
    total_sec=14.0,
    spec=parse_job(JOB, TYPICAL, Limits(200, 2048, 5000, 3600), generate_input=True),
    unit="ffmpeg-job-j1.service",
    transcode_sec=10.0,
    usage=Used(),
    progress=Progress(True, 300, 0.0, 2e6, 2_000_000, 9.97, 1, 2, 1.5),
    media=Media("mp4", 10.0, 2_097_152, 1_677_721, "h264", 1280, 720, 30.0, 300, True),
    input_bytes=4_000_000,
    output_bytes=2_097_152,
    generation_sec=2.0,
    input_encoder="libx264",
    command=("/usr/bin/ffmpeg", "-i", "http://u:p@h/x?token=t", "file:/o.mp4"),
    log_tail="[info] fine\n",
)


STREAM_JOB = JOB.model_copy(
    update={"parameters": {"output_mode": "stream", "stream_key": "hunter2"}}
)
STREAM = parse_job(
    STREAM_JOB,
    TYPICAL,
    Limits(200, 2048, 5000, 3600),
    generate_input=True,
    stream_host="master",
)


def test_a_stream() -> None:
    assert RUN.progress is not None
    run = replace(
        RUN,
        job=STREAM_JOB,
        spec=STREAM,
        media=sent_media(STREAM, RUN.progress),
        input_bytes=None,
        input_encoder=None,
        output_bytes=2_000_000,
        command=("/usr/bin/ffmpeg", "rtmp://master:1935/live/hunter2"),
        log_tail="[error] rtmp://master:1935/live/hunter2: no\n",
    )
    result = build_result(run, COMPLETED)
    metrics = result.metrics
    assert metrics is not None
    assert metrics["output_size_bytes"] == 2_000_000
    assert not {"output_file_bytes", "input_file_bytes", "input_encoder_used"} & set(metrics)
    assert (metrics["frames"], metrics["fps"], metrics["speed"]) == (300, 30.0, 1.5)
    assert (metrics["bitrate"], metrics["dropped_frames"]) == ("2000k", 2)
    assert (metrics["resolution"], metrics["video_codec"]) == ("1280x720", "h264")
    assert metrics["bandwidth_mbps"] == pytest.approx(1.6)
    assert result.analyzer_output is not None
    assert result.analyzer_output["output_mode"] == "rtmp"
    assert result.analyzer_output["container"] == "flv"
    assert result.analyzer_output["stream_url"] == "rtmp://master:1935/live/***"
    assert "hunter2" not in result.model_dump_json()


def test_a_stream_that_was_refused_is_still_one() -> None:
    result = build_result(replace(RUN, job=STREAM_JOB, spec=None), Outcome(False))
    assert result.analyzer_output is not None
    assert result.analyzer_output["output_mode"] == "rtmp"


def test_a_completed_job() -> None:
    result = build_result(RUN, COMPLETED)
    assert (result.job_id, result.node_id, result.status) == ("j1", "n1", "completed")
    assert result.error is None
    assert result.metrics == {
        "duration": 14.0,
        "engine": "ffmpeg",
        "scenario": "720p30-h264",
        "queue_time_seconds": 5.0,
        "processing_time_seconds": 14.0,
        "transcode_duration_sec": 10.0,
        "unit": "ffmpeg-job-j1.service",
        "node": "worker-1",
        "output_size_bytes": 2_097_152,
        "output_size_mb": 2.0,
        "output_file_bytes": 2_097_152,
        "input_file_bytes": 4_000_000,
        "output_duration_sec": 10.0,
        "frames_encoded": 300,
        "frames": 300,
        "encoding_fps": 30.0,
        "fps": 30.0,
        "speed": 1.5,
        "dropped_frames": 2,
        "duplicated_frames": 1,
        "resolution": "1280x720",
        "pixels_processed": 300 * 1280 * 720,
        "video_codec": "h264",
        "input_generation_duration_sec": 2.0,
        "input_encoder_used": "libx264",
        "input_file_size_bytes": 4_000_000,
        "bitrate": "1678k",
        "bitrate_bps": 1_677_721,
        "bandwidth_mbps": pytest.approx(4.8777216),
        "cpu_seconds": 3.5,
        "memory_peak_bytes": 1000,
        "io_read_bytes": 10,
        "io_write_bytes": 20,
        "cpu_stall_seconds": 1.25,
        "memory_stall_seconds": 0.0,
        "sla_worthy": True,
        "sla_category": "production",
        "platform_sla_compliant": True,
        "platform_sla_reason": "compliant",
    }
    assert result.analyzer_output["limits"] == {
        "cpu_percent": 200,
        "memory_mb": 2048,
        "disk_mb": 5000,
        "timeout_sec": 3600,
    }
    assert result.analyzer_output["status"] == "success"
    assert result.logs == "$ /usr/bin/ffmpeg -i 'http://***@h/x?***' file:/o.mp4\n[info] fine"


def test_a_job_that_was_never_understood() -> None:
    job = Job(id="j2", scenario=["odd"], parameters="x")
    run = JobRun(job, "n1", "w", T0, T0, 0.0)
    result = build_result(run, Outcome.failed(Reason.USER_ERROR, "no timeout_sec"))
    assert result.status == "failed"
    assert result.error == "user_error: no time-out_sec"
    assert result.metrics["failure_reason"] == "user_error"
    assert result.metrics["platform_sla_reason"] == "external_failure_platform_ok"
    assert "frames" not in result.metrics
    assert result.logs is None


def test_what_is_known_of_a_failed_job_is_sent() -> None:
    run = replace(RUN, media=None, output_bytes=None, progress=None)
    result = build_result(run, Outcome.failed(Reason.TIMEOUT, "too slow"))
    assert result.metrics["cpu_seconds"] == 3.5
    assert result.metrics["memory_peak_bytes"] == 1000
    assert result.metrics["failure_reason"] == "timeout"
    assert result.progress is None


def test_all_numbers_are_finite() -> None:
    used = Used(cpu_seconds=float("nan"))
    run = replace(
        RUN,
        usage=used,
        total_sec=float("inf"),
        transcode_sec=0.0,
        progress=Progress(frame=1, speed=float("inf")),
    )
    result = build_result(run, COMPLETED)
    json.dumps([result.metrics, result.analyzer_output], allow_nan=False)


def test_logs_are_bounded_and_safe() -> None:
    tail = "rtmp://host/live/" + "k" * 20 + "\n" + "\x1b[31mé\n" * 40_000
    logs = build_result(replace(RUN, log_tail=tail), COMPLETED).logs
    assert logs is not None
    assert len(logs.encode()) <= MAX_LOG_BYTES
    assert logs.startswith("$ /usr/bin/ffmpeg")
    assert "\x1b" not in logs
    cut = "rtmp://host/live/secretkey\n" + "y\n" * (MAX_LOG_BYTES // 2 - 80)
    logs = build_result(replace(RUN, log_tail=cut), COMPLETED).logs
    assert logs is not None
    assert "key" not in logs


def test_an_address_in_the_command_is_printable() -> None:
    command = ("/usr/bin/ffmpeg", "-i", "http://host/\u202egpm.\x1b[31m?token=secret")
    logs = build_result(replace(RUN, command=command), COMPLETED).logs
    assert logs is not None
    first = logs.splitlines()[0]
    assert first.isprintable()
    assert "host" in first
    assert "secret" not in first


def test_a_negative_queue_time_is_none_at_all() -> None:
    job = JOB.model_copy(update={"started_at": T0 - timedelta(hours=1)})
    assert build_result(replace(RUN, job=job), COMPLETED).metrics["queue_time_seconds"] == 0.0


def judged(outcome: Outcome = COMPLETED, **fields: Any) -> Sla:
    """The verdict on a plain job that was done in time, but for these fields."""
    plain: dict[str, Any] = {
        "classification": "", "scenario": "720p30-h264", "duration_sec": None,
        "queue": "default", "priority": "medium", "queue_sec": 1.0, "processing_sec": 100.0,
    }  # fmt: skip
    return sla(outcome=outcome, **plain | fields)


@pytest.mark.parametrize(
    ("verdict", "category"),
    [
        (judged(classification="production", scenario="test-x"), "production"),
        (judged(classification="Test"), "test"),
        (judged(classification="debug", queue_sec=99), "debug"),
        (judged(scenario="Benchmark-4k"), "benchmark"),
        (judged(duration_sec=9.9), "test"),
        (judged(duration_sec=10.0), "production"),
        (judged(queue="batch", priority="low"), "batch"),
        (judged(classification="nightly"), "production"),
    ],
)
def test_which_jobs_count(verdict: Sla, category: str) -> None:
    assert verdict.category == category
    assert verdict.worthy is (category == "production")
    assert verdict.worthy or (verdict.compliant, verdict.reason) == (True, "not_sla_worthy")


@pytest.mark.parametrize(
    ("verdict", "compliant"),
    [
        (judged(queue_sec=30.0, processing_sec=600.0), True),
        (judged(queue_sec=30.1), False),
        (judged(queue_sec=None), True),
        (judged(processing_sec=600.1), False),
        (judged(Outcome.failed(Reason.PLATFORM_ERROR, "")), False),
        (judged(Outcome.failed(Reason.RESOURCE_ERROR, "")), False),
        (judged(Outcome.failed(Reason.TIMEOUT, ""), processing_sec=599), True),
        (judged(Outcome.failed(Reason.TIMEOUT, ""), processing_sec=601), False),
        (judged(Outcome.failed(Reason.USER_ERROR, ""), queue_sec=99, processing_sec=999), True),
        (judged(Outcome.failed(Reason.RUNTIME_ERROR, "")), True),
    ],
)
def test_what_keeps_the_promise(verdict: Sla, compliant: bool) -> None:
    assert verdict.compliant is compliant


def test_the_log_is_sent_without_what_is_there_for_its_figures() -> None:
    noise = "[graph @ 0x5] [verbose] http://u:p@h/x\n[verbose] *** 1 dup!\n" * 10_000
    result = build_result(replace(RUN, log_tail="[error] the cause\n" + noise), COMPLETED)
    assert result.logs is not None
    assert result.logs.splitlines()[1:] == ["[error] the cause"]
