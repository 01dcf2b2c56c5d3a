"""The result that goes to the master: every number true, finite, and named as before."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Protocol

from worker.jobs.judge import UsageLike
from worker.jobs.labels import parse_labels
from worker.jobs.outcome import Outcome, error_text
from worker.jobs.probe import Media
from worker.jobs.progress import Progress
from worker.jobs.sla import Sla, sla
from worker.jobs.spec import JobSpec, StreamOutput
from worker.jobs.text import is_url, plain, redact, shortened
from worker.master.wire import Job, JobResult

MAX_LOG_BYTES = 64 * 1024
_VERBOSE = re.compile(r"^(?:\[[^\]\n]{1,80} @ 0x[0-9a-f]+\] )*\[(?:verbose|debug|trace)\]")


class FullUsage(UsageLike, Protocol):
    """With the kernel's pressure stall information: how long some of the unit had to wait."""

    @property
    def cpu_stall_seconds(self) -> float | None: ...
    @property
    def memory_stall_seconds(self) -> float | None: ...
    @property
    def io_stall_seconds(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class JobRun:
    """What is known of a job's run when it is over. None is not known, or did not come to pass."""

    job: Job
    node_id: str
    """As the master named us at registration."""
    node_name: str
    started_at: datetime
    """When this worker took the job."""
    ended_at: datetime
    total_sec: float
    """From the one to the other, by a clock that nobody sets."""
    spec: JobSpec | None = None
    """None if the job could not be understood."""
    unit: str = ""
    """The transcode's, or that of the input if it came to no transcode; empty without any."""
    transcode_sec: float | None = None
    usage: FullUsage | None = None
    """Of that unit."""
    progress: Progress | None = None
    media: Media | None = None
    """The output, as probed."""
    input_bytes: int | None = None
    output_bytes: int | None = None
    """The file's size, or what was sent of a stream."""
    generation_sec: float | None = None
    """How long making the input took."""
    input_encoder: str | None = None
    """None if the input was given."""
    command: tuple[str, ...] = ()
    """Of the transcode."""
    limits_changed: str = ""
    """Limits that somebody else changed while it ran, for people; empty: none."""
    log_tail: str = ""
    """What ffmpeg said, in whole lines; no more than fits into memory with ease."""


def build_result(run: JobRun, outcome: Outcome) -> JobResult:
    """The result of a run, ready to be sent and free of secrets.

    Metrics that are not known are left out rather than sent as 0.
    """
    metrics = {**_common(run), **_figures(run), **_sla(run, outcome)}
    if not outcome.completed and outcome.reason is not None:
        metrics["failure_reason"] = outcome.reason.value
    return JobResult(
        job_id=run.job.id,
        node_id=run.node_id,
        status="completed" if outcome.completed else "failed",
        progress=100 if outcome.completed else None,
        metrics=_known(metrics),
        analyzer_output=_known(_analysis(run, outcome)),
        error=error_text(outcome),
        logs=_logs(run),
        completed_at=run.ended_at,
    )


def queue_seconds(run: JobRun) -> float | None:
    """How long the job waited, by the master's own clock where it gives both times."""
    if run.job.created_at is None:
        return None
    taken = run.job.started_at or run.started_at
    return max(0.0, (taken - run.job.created_at).total_seconds())


def _common(run: JobRun) -> dict[str, Any]:
    labels = parse_labels(run.job)
    return {
        "duration": run.total_sec,
        "engine": run.spec.engine if run.spec else "ffmpeg",
        "scenario": labels.scenario,
        "queue_time_seconds": queue_seconds(run),
        "processing_time_seconds": run.total_sec,
        "transcode_duration_sec": run.transcode_sec,
        "unit": run.unit or None,
        "node": run.node_name,
    }


def _figures(run: JobRun) -> dict[str, Any]:
    progress, media, usage = run.progress or Progress(), run.media or Media(), run.usage
    seconds = run.transcode_sec
    output = run.output_bytes
    is_stream = run.spec is not None and isinstance(run.spec.output, StreamOutput)
    frames = media.frames if progress.frame is None else progress.frame
    size = (media.width, media.height) if media.width and media.height else None
    speed = progress.speed
    if speed is None and progress.out_time_sec is not None and seconds:
        speed = progress.out_time_sec / seconds
    figures: dict[str, Any] = {
        "output_size_bytes": output,
        "output_size_mb": None if output is None else output / 2**20,
        "output_file_bytes": None if is_stream else output,
        "input_file_bytes": run.input_bytes,
        "output_duration_sec": media.duration_sec or progress.out_time_sec,
        "frames_encoded": frames,
        "frames": frames,
        # ffmpeg's own figure is 0 for the first half second.
        "encoding_fps": frames / seconds if frames is not None and seconds else progress.fps,
        "fps": media.frame_rate,
        "speed": speed,
        "dropped_frames": progress.drop_frames,
        "duplicated_frames": progress.dup_frames,
        "resolution": "{}x{}".format(*size) if size else None,
        "pixels_processed": size[0] * size[1] * frames if size and frames is not None else None,
        "video_codec": media.codec,
        "input_generation_duration_sec": run.generation_sec,
        "input_encoder_used": run.input_encoder,
        "input_file_size_bytes": run.input_bytes if run.input_encoder else None,
    }
    bitrate = media.bitrate_bps or progress.bitrate_bps
    if bitrate:
        figures["bitrate"] = f"{round(bitrate / 1000)}k"  # the form in which clients give it
        figures["bitrate_bps"] = round(bitrate)
    figures["bandwidth_mbps"] = bandwidth_mbps(run)
    figures |= {
        "cpu_seconds": usage.cpu_seconds if usage else None,
        "memory_peak_bytes": usage.memory_peak_bytes if usage else None,
        "io_read_bytes": usage.io_read_bytes if usage else None,
        "io_write_bytes": usage.io_write_bytes if usage else None,
        "cpu_stall_seconds": usage.cpu_stall_seconds if usage else None,
        "memory_stall_seconds": usage.memory_stall_seconds if usage else None,
        "io_stall_seconds": usage.io_stall_seconds if usage else None,
    }
    return figures


def bandwidth_mbps(run: JobRun) -> float | None:
    """Input and output over the time of the transcode, Mbit/s."""
    if not run.transcode_sec or (run.input_bytes is None and run.output_bytes is None):
        return None
    return ((run.input_bytes or 0) + (run.output_bytes or 0)) * 8 / 1e6 / run.transcode_sec


def verdict_of(run: JobRun, outcome: Outcome) -> Sla:
    """Whether the platform kept its promise with this job."""
    labels = parse_labels(run.job)
    return sla(
        classification=labels.classification,
        scenario=labels.scenario,
        duration_sec=labels.duration_sec,
        queue=labels.queue.value,
        priority=labels.priority.value,
        outcome=outcome,
        queue_sec=queue_seconds(run),
        processing_sec=run.total_sec,
    )


def _sla(run: JobRun, outcome: Outcome) -> dict[str, Any]:
    verdict = verdict_of(run, outcome)
    return {
        "sla_worthy": verdict.worthy,
        "sla_category": verdict.category,
        "platform_sla_compliant": verdict.compliant,
        "platform_sla_reason": verdict.reason,
    }


def _analysis(run: JobRun, outcome: Outcome) -> dict[str, Any]:
    spec, labels = run.spec, parse_labels(run.job)
    analysis: dict[str, Any] = {
        "scenario": labels.scenario,
        "engine": spec.engine if spec else "ffmpeg",
        "output_mode": "rtmp" if labels.streaming else "file",
        "exec_duration": run.total_sec if run.transcode_sec is None else run.transcode_sec,
        "status": "success" if outcome.completed else "failed",
    }
    if spec is not None:
        analysis |= {
            "limits": _known(asdict(spec.limits)),
            "limits_changed": run.limits_changed or None,
            "encoder": spec.encoder,
            "preset": spec.preset,
            "container": spec.muxer,
            "threads": spec.threads,
            "queue": spec.queue.value,
            "priority": spec.priority.value,
            "notes": list(spec.notes) or None,
        }
        if isinstance(spec.output, StreamOutput):
            analysis["stream_url"] = redact(spec.output.url)
    return analysis


def _logs(run: JobRun) -> str | None:
    """The command, and as many of the log's last lines as fit."""
    command = ""
    if run.command:
        words = (plain(redact(word) if is_url(word) else word, 4096) for word in run.command)
        command = shortened("$ " + shlex.join(words), MAX_LOG_BYTES // 16)
    room = MAX_LOG_BYTES - len(command.encode())
    kept: list[str] = []
    for line in reversed(run.log_tail.splitlines()):
        if _VERBOSE.search(line):
            continue  # there for its figures alone, and nobody has looked for secrets in it
        safe = redact(plain(line, 2000))
        room -= len(safe.encode()) + 1
        if room < 0:
            break
        if safe:
            kept.append(safe)
    return "\n".join([command, *reversed(kept)] if command else kept[::-1]) or None


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """Without None, and without the NaN and inf that JSON has no words for."""
    return {
        key: _known(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }
