"""From the master's job to a JobSpec: every value judged, or a JobError that names it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from worker.errors import Reason
from worker.jobs import streams
from worker.jobs.capabilities import Capabilities
from worker.jobs.containers import DEFAULT_MUXER, fits
from worker.jobs.encoders import check_preset, check_tune, choose_encoder, codec_of
from worker.jobs.labels import MAX_DURATION_SEC, first_of, is_streaming, parse_labels
from worker.jobs.limits import resolve_limits
from worker.jobs.places import read_input, read_output
from worker.jobs.policy import SHIPPED, Policy
from worker.jobs.scenario import Scenario, read_scenario
from worker.jobs.spec import (
    FileInput,
    GeneratedInput,
    JobSpec,
    Limits,
    StreamOutput,
    UrlInput,
)
from worker.jobs.text import label
from worker.jobs.values import choices, integer, mapping, name, number, refused, string
from worker.master.wire import Job

MAX_GENERATED_SEC = 120.0
DEFAULT_GENERATED_SEC = 10.0
DEFAULT_BITRATE = 2_000_000
MIN_SIDE, MAX_SIDE = 16, 16384  # H.264's largest level ends below 16384, and AV1 goes beyond
MAX_FPS = 240.0
MAX_THREADS = 256

KNOWN_HWACCELS = frozenset(
    {"cuda", "cuvid", "nvdec", "vaapi", "qsv", "vdpau", "drm", "opencl", "vulkan", "videotoolbox"}
    | {"d3d11va", "d3d12va", "dxva2", "mediacodec", "rkmpp", "amf"}
)
KNOWN_PARAMETERS = frozenset(
    {"input", "output", "output_mode", "rtmp_url", "stream_key", "codec", "bitrate", "preset"}
    | {"duration", "duration_seconds", "resolution", "resolution_width", "resolution_height"}
    | {"frame_rate", "fps", "hwaccel", "threads", "tune", "engine", "resource_limits"}
    | {"classification", "confidence", "metadata", "description", "name", "tags", "labels"}
)
_MAX_NAMED = 10

_Parameters = Mapping[str, Any]


def parse_job(
    job: Job,
    capabilities: Capabilities,
    defaults: Limits,
    *,
    generate_input: bool,
    stream_host: str = "",
    policy: Policy = SHIPPED,
) -> JobSpec:
    """All that decides how ``job`` is run. Raises JobError, and nothing else.

    ``stream_host`` is where a stream goes that names no place: the master's host, without
    brackets; empty where there is none. ``policy`` is what the operator allows.
    Where two fields mean the same thing, only the one that counts is judged.
    """
    parameters = mapping(job.parameters, "parameters")
    scenario = read_scenario(string(job.scenario, "scenario") or "")
    labels = parse_labels(job)
    engine = _engine(job, parameters)
    streaming = is_streaming(parameters)
    limits, notes = resolve_limits(
        job.resource_limits, parameters, job.wrapper_constraints, defaults, capabilities
    )

    duration = _duration(parameters)
    longest = MAX_DURATION_SEC if streaming else MAX_GENERATED_SEC
    source = _source(parameters, scenario, duration, generate_input, longest, policy)
    given = not isinstance(source, GeneratedInput)
    encoder = _encoder(parameters, scenario, capabilities, streaming)
    output: Path | StreamOutput | None
    stream_notes: tuple[str, ...] = ()
    if streaming:
        target = streams.read_target(parameters, job.id, stream_host, policy.output_protocols)
        output, muxer, stream_notes = target.output, streams.MUXER, target.notes
    else:
        output, muxer = _output(parameters, source, policy)
    if not fits(codec_of(encoder), muxer):
        raise refused(
            "parameters.output" if output else "parameters.codec",
            str(output) if output else encoder,
            f"the container {muxer} cannot hold what {encoder} makes; choose another suffix or "
            "codec",
        )
    preset, preset_note = check_preset(
        name(parameters.get("preset"), "parameters.preset"), encoder, capabilities.cpus
    )
    return JobSpec(
        id=job.id,
        scenario=labels.scenario,
        queue=labels.queue,
        priority=labels.priority,
        classification=labels.classification,
        engine=engine,
        source=source,
        output=output,
        muxer=muxer,
        encoder=encoder,
        bitrate_bps=_bitrate(parameters.get("bitrate")),
        preset=preset,
        tune=check_tune(name(parameters.get("tune"), "parameters.tune"), encoder),
        threads=_threads(parameters, limits, capabilities),
        hwaccel=_hwaccel(parameters, capabilities),
        duration_sec=duration,
        scale=_size(parameters, scenario) if given and _has_size(parameters) else None,
        frame_rate=_asked_frame_rate(parameters) if given else None,
        limits=limits,
        notes=(
            *notes,
            *stream_notes,
            *([preset_note] if preset_note else []),
            *_unknown(parameters),
        ),
    )


def _engine(job: Job, parameters: _Parameters) -> str:
    engine, field = name(job.engine, "engine"), "engine"
    if engine is None:
        field = "parameters.engine"
        engine = name(parameters.get("engine"), field)
    if engine in (None, "auto", "ffmpeg"):
        return "ffmpeg"
    if engine == "gstreamer":
        raise refused(
            field, engine, "this node has no GStreamer engine", Reason.CAPABILITY_MISMATCH
        )
    raise refused(field, engine, "must be one of auto, ffmpeg, gstreamer")


def _duration(parameters: _Parameters) -> float | None:
    field, value = first_of(parameters, "duration", "duration_seconds")
    if value is None:
        return None
    seconds = number(value, field, 0, MAX_DURATION_SEC, " seconds")
    # Less than a millisecond is no video, and ffmpeg gets milliseconds.
    if seconds < 0.001:
        raise refused(field, value, "must be greater than 0 seconds")
    return seconds


def _source(
    parameters: _Parameters,
    scenario: Scenario,
    duration: float | None,
    generate_input: bool,
    longest: float,
    policy: Policy,
) -> GeneratedInput | FileInput | UrlInput:
    value = string(parameters.get("input"), "parameters.input")
    if value is not None:
        return read_input(value, policy)
    if not generate_input:
        raise refused("parameters.input", None, "must be given: this node generates no inputs")
    width, height = _size(parameters, scenario)
    frame_rate = _asked_frame_rate(parameters)
    if frame_rate is None:
        frame_rate = 30.0
        if scenario.frame_rate is not None:
            frame_rate = number(scenario.frame_rate, "scenario's frame rate", 1, MAX_FPS)
    length = min(longest, duration or DEFAULT_GENERATED_SEC)
    return GeneratedInput(width, height, frame_rate, length)


def _has_size(parameters: _Parameters) -> bool:
    fields = ("resolution", "resolution_width", "resolution_height")
    return any(parameters.get(field) not in (None, "") for field in fields)


def _size(parameters: _Parameters, scenario: Scenario) -> tuple[int, int]:
    """Width and height, each from the first place that says it."""
    width, height = (
        _side(parameters[field], f"parameters.{field}")
        if parameters.get(field) is not None
        else None
        for field in ("resolution_width", "resolution_height")
    )
    if width is not None and height is not None:
        return width, height
    text = string(parameters.get("resolution"), "parameters.resolution")
    if text is not None:
        match = re.fullmatch(r"(\d{1,9})\s*x\s*(\d{1,9})", text, re.I | re.A)
        if match is None:
            raise refused("parameters.resolution", text, "must be WIDTHxHEIGHT, e.g. 1280x720")
        other, field = (int(match[1]), int(match[2])), "parameters.resolution"
    elif scenario.width is not None and scenario.height is not None:
        other, field = (scenario.width, scenario.height), "scenario"
    else:
        other, field = (1280, 720), "default"
    return (
        _side(other[0], f"{field}'s width") if width is None else width,
        _side(other[1], f"{field}'s height") if height is None else height,
    )


def _side(value: object, field: str) -> int:
    side = integer(value, field, MIN_SIDE, MAX_SIDE, " pixels, and even")
    if side % 2:
        raise refused(field, value, "must be even, since colour has half the resolution")
    return side


def _asked_frame_rate(parameters: _Parameters) -> float | None:
    field, value = first_of(parameters, "frame_rate", "fps")
    return None if value is None else number(value, field, 1, MAX_FPS, " frames per second")


def _encoder(
    parameters: _Parameters, scenario: Scenario, capabilities: Capabilities, streaming: bool
) -> str:
    codec, field = name(parameters.get("codec"), "parameters.codec"), "parameters.codec"
    if codec is None:
        codec, field = scenario.codec, "scenario's codec"
    encoder = choose_encoder(codec, field, capabilities)
    if streaming and codec is None and codec_of(encoder) != streams.CODEC:
        return choose_encoder(streams.CODEC, "codec of a stream", capabilities)
    if streaming:
        streams.check_codec(encoder, codec, field)
    return encoder


def _output(parameters: _Parameters, source: object, policy: Policy) -> tuple[Path | None, str]:
    field = "parameters.output"
    value = string(parameters.get("output"), field)
    if "file" not in policy.output_protocols:
        raise refused(field, value, "files are not allowed here (OUTPUT_PROTOCOLS)")
    return (None, DEFAULT_MUXER) if value is None else read_output(value, source, policy)


def _bitrate(value: object) -> int:
    field = "parameters.bitrate"
    accepted = "must be from 1k to 1G bit/s, e.g. 2000k, 2M or 2000000"
    if value is None or value == "":
        return DEFAULT_BITRATE
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([kKmMgG]?)", value.strip(), re.A)
        if match is None:
            raise refused(field, value, accepted)
        unit = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[match[2].lower()]
        bps = round(float(match[1]) * unit)
    else:
        bps = round(number(value, field, 1000, 10**9, " bit/s"))
    if not 1000 <= bps <= 10**9:
        raise refused(field, value, accepted)
    return bps


def _threads(parameters: _Parameters, limits: Limits, capabilities: Capabilities) -> int:
    value = parameters.get("threads")
    if value is not None:
        return integer(value, "parameters.threads", 1, MAX_THREADS)
    return max(1, min(ceil(limits.cpu_percent / 100), capabilities.cpus, MAX_THREADS))


def _hwaccel(parameters: _Parameters, capabilities: Capabilities) -> str | None:
    field = "parameters.hwaccel"
    hwaccel = name(parameters.get("hwaccel"), field)
    if hwaccel in (None, "none"):
        return None
    if hwaccel == "auto":
        # Without any hardware, ffmpeg's search only fills the log with errors.
        return "auto" if capabilities.hwaccels else None
    if hwaccel in KNOWN_HWACCELS and hwaccel in capabilities.hwaccels:
        return hwaccel
    if hwaccel in KNOWN_HWACCELS:
        raise refused(field, hwaccel, "this node cannot decode with it", Reason.CAPABILITY_MISMATCH)
    raise refused(field, hwaccel, choices(KNOWN_HWACCELS | {"none", "auto"}))


def _unknown(parameters: _Parameters) -> list[str]:
    names = sorted(str(field) for field in parameters if field not in KNOWN_PARAMETERS)
    if not names:
        return []
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    listed = ", ".join(label(field, 40) for field in names[:_MAX_NAMED])
    return [f"unknown parameters ignored: {listed}{more}"]
