"""One hostile job on its way through everything that is made of it."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from tests.fuzz.invariants import (
    FFMPEG,
    FFPROBE,
    FILES,
    SECRETS,
    Violation,
    check_command,
    check_property,
    check_secret,
    check_text,
)
from tests.fuzz.jobs import Raw, make_job
from worker.errors import JobError, Reason
from worker.jobs import ffmpeg, streams
from worker.jobs.capabilities import TYPICAL, Capabilities
from worker.jobs.labels import parse_labels
from worker.jobs.outcome import COMPLETED, Outcome
from worker.jobs.parse import parse_job
from worker.jobs.policy import Policy
from worker.jobs.report import JobRun, build_result
from worker.jobs.spec import FileInput, GeneratedInput, JobSpec, Limits, StreamOutput, UrlInput
from worker.jobs.text import redact
from worker.launching import launch_of
from worker.master.wire import Job, encode
from worker.site import Site
from worker.systemd.names import Step, unit_name
from worker.systemd.properties import properties
from worker.systemd.sandbox import JobRoot
from worker.workspace import Workspace

MAX_SECONDS = 1.0
"""Of CPU time, for one job."""
DEFAULTS = Limits(cpu_percent=200, memory_mb=2048, disk_mb=5000, timeout_sec=3600)
WITH_GPU = Capabilities(
    cpus=16,
    memory_bytes=64 * 2**30,
    encoders=TYPICAL.encoders | {"h264_nvenc", "hevc_nvenc", "h264_vaapi", "librav1e"},
    listed_encoders=TYPICAL.listed_encoders,
    hwaccels=frozenset({"cuda", "vaapi"}),
    has_gpu=True,
    default_encoder="h264_nvenc",
)
_WORK = Path("/work")
_CLOSED = tuple(_WORK / name for name in ("jobs", "root", "ledger.db"))
POLICIES = (
    Policy(
        input_dirs=(Path("/media"), Path("/data"), _WORK / "media"),
        output_dirs=(_WORK, Path("/data/out"), Path("/out")),
        closed=_CLOSED,
    ),
    Policy(
        input_dirs=(Path("/media"),),
        output_dirs=(Path("/out"),),
        input_protocols=frozenset({"file", "https", "srt"}),
        output_protocols=frozenset({"rtmps", "file"}),
        closed=_CLOSED,
    ),
    Policy(input_protocols=frozenset({"http"}), output_protocols=frozenset({"rtmp"})),
    Policy(input_dirs=(_WORK,), output_dirs=(_WORK,), closed=_CLOSED),
)
_ROOT = JobRoot(_WORK / "root", ("/usr",))
_SPACE = Workspace(Path(FILES).parent, lock=-1)
"""Never opened."""
_NOW = datetime(2024, 1, 1, tzinfo=UTC)


def rng_of(seed: int, number: int) -> random.Random:
    return random.Random((seed << 40) + number)


def run_case(rng: random.Random) -> str:
    """Make a job and judge what becomes of it; returns a name for that. Raises Violation."""
    return judge_job(make_job(rng), rng)


def judge_job(raw: Raw, rng: random.Random) -> str:
    """See ``run_case``. Any other error than Violation is one of the program."""
    policy = rng.choice((POLICIES[0], *POLICIES))
    begun = time.perf_counter()
    verdict = _judged(raw, rng, policy)
    if time.perf_counter() - begun > MAX_SECONDS:
        # Once more, by the clock that a busy machine does not matter to, but that takes its time.
        begun = time.process_time()
        _judged(raw, rng, policy)
        if (took := time.process_time() - begun) > MAX_SECONDS:
            raise Violation(f"took {took:.1f} s")
    return verdict


def _judged(raw: Raw, rng: random.Random, policy: Policy) -> str:
    try:
        job = Job.model_validate(raw)
    except ValidationError:
        return "unreadable"
    labels = parse_labels(job)
    check_text(labels.scenario, "the scenario's label", 200)
    check_text(labels.classification, "the classification", 60)
    unit = unit_name(job.id)
    if not unit.isascii() or len(unit) > 130 or "/" in unit:
        raise Violation(f"unit {unit!r}")
    try:
        spec = parse_job(
            job,
            rng.choice((TYPICAL, WITH_GPU)),
            DEFAULTS,
            generate_input=rng.random() < 0.9,
            stream_host=rng.choice(("master", "fd00::1", "")),
            policy=policy,
        )
    except JobError as error:
        check_text(error.message, "the error")
        _check_result(job, None, (), Outcome.of(error))
        field = error.message.partition(" = ")[0].partition(":")[0]
        return f"{error.reason.value}: {field[:40]}"
    for note in spec.notes:
        check_text(note, "a note")
    for step, command in _commands(spec):
        check_command(command, policy)
        _check_unit(job, spec, step, command, policy)
    _check_result(job, spec, command, COMPLETED)
    for url in _urls(spec):
        message = f"{url}: Connection refused, Server said no"
        _check_result(job, spec, command, Outcome.failed(Reason.NETWORK_ERROR, message))
    kind = "a stream" if isinstance(spec.output, StreamOutput) else "a file"
    return f"accepted: {type(spec.source).__name__} to {kind}"


def _commands(spec: JobSpec) -> list[tuple[Step, tuple[str, ...]]]:
    made, folder = Path(f"{FILES}/input.mp4"), Path(FILES)
    source = ffmpeg.source_name(spec, made)
    if isinstance(spec.output, StreamOutput):
        command = ffmpeg.stream_command(spec, FFMPEG, source, secrets=Path(SECRETS))
        # Credentials cannot be kept out of a command line, nor can what is secret in an input.
        check_secret(" ".join(command[command.index("-c:v") : -1]), "the command")
        check_secret(command[-1].partition("@")[2] or command[-1], "the output's URL")
        _check_secrets_file(ffmpeg.stream_secrets(spec))
        return [(Step.MAIN, command)]
    suffix = spec.output.suffix if spec.output is not None else ".mp4"
    output = folder / f"output{suffix}"
    commands = [
        (Step.PROBE, ffmpeg.probe_command(FFPROBE, output)),
        (Step.MAIN, ffmpeg.transcode_command(spec, FFMPEG, source, output)),
    ]
    if isinstance(spec.source, GeneratedInput):
        commands.insert(0, (Step.INPUT, ffmpeg.input_command(spec, FFMPEG, made, threads=2)))
    return commands


def _check_secrets_file(text: str) -> None:
    lines = text.split("\n")[:-1] if text else []
    fit = all(
        line.startswith(start) and len(line) > len(start) and len(line.encode()) < 998
        for line, start in zip(lines, ("rtmp_app=", "rtmp_playpath="), strict=False)
    )
    if not fit or len(lines) > 2 or "\0" in text or "\r" in text or text[-1:] not in ("", "\n"):
        raise Violation(f"the file of secrets is {text!r}")


def _check_unit(
    job: Job, spec: JobSpec, step: Step, command: tuple[str, ...], policy: Policy
) -> None:
    readable = (spec.source.path,) if isinstance(spec.source, FileInput) else ()
    site = Site(_ROOT, policy, group="ffmpeg-worker")
    launch = launch_of(step, job.id, _SPACE, spec, spec.limits, command, site, readable)
    for item in properties(launch, version=252):
        check_property(item.value, item.name)
        if item.name not in ("ExecStart", "ExecStartEx"):
            check_secret(str(item.value), f"property {item.name}")


def _urls(spec: JobSpec) -> list[str]:
    places = (spec.source, spec.output)
    return [place.url for place in places if isinstance(place, UrlInput | StreamOutput)]


def _check_result(
    job: Job, spec: JobSpec | None, command: tuple[str, ...], outcome: Outcome
) -> None:
    """What the master and the log are told."""
    log = ""
    if spec is not None:
        log = "\n".join(f"[error] {url}: no\n[info] Input #0, from '{url}':" for url in _urls(spec))
        if isinstance(spec.output, StreamOutput):
            key = ffmpeg.stream_secrets(spec).partition("rtmp_playpath=")[2].strip()
            log += f"\n[rtmp @ 0x1] [error] Server error: {key} is in use"
            log = streams.without_key(log, spec.output.url)
    run = JobRun(job, "n", "node", _NOW, _NOW, 1.0, spec=spec, command=command, log_tail=log)
    result = build_result(run, outcome)
    for what, text in (("the result's error", result.error), ("a line", redact(log))):
        check_secret(text or "", what)
    if result.error is not None:
        check_text(result.error, "the result's error")
    check_secret(result.logs or "", "the result's log")
    # The fields that are not judged here are the job's own words: its id and its labels.
    check_secret(encode(result).decode(), "the result")
