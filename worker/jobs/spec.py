"""A job that can be trusted: every value parsed and bounded, nothing left to interpret."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from worker.jobs.encoders import is_hardware
from worker.systemd.launch import DeviceLimit


class Queue(StrEnum):
    LIVE = "live"
    DEFAULT = "default"
    BATCH = "batch"


class Priority(StrEnum):
    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a job may use."""

    cpu_percent: int
    """100 is one core."""
    memory_mb: int
    disk_mb: int
    timeout_sec: int
    cpu_weight: int | None = None
    """1 to 10000; None leaves it to the priority."""
    io: DeviceLimit | None = None


@dataclass(frozen=True, slots=True)
class GeneratedInput:
    """A test video to be made before the job runs."""

    width: int
    height: int
    frame_rate: float
    duration_sec: float
    """Of the generated file, at most 120 s; a longer job loops over it. A stream is made as it
    is sent, so it has its whole length."""


@dataclass(frozen=True, slots=True)
class FileInput:
    path: Path


@dataclass(frozen=True, slots=True)
class UrlInput:
    url: str
    scheme: str
    further: tuple[str, ...] = ()
    """Schemes that its server may lead to, besides its own."""


@dataclass(frozen=True, slots=True)
class StreamOutput:
    """A server that the output is sent to while it is made."""

    url: str
    """``rtmp://`` or ``rtmps://``; its last element, the stream's key, is a secret."""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """Everything that decides how a job is run."""

    id: str
    scenario: str
    """The scenario as sent, shortened and free of control characters: a label."""
    queue: Queue
    priority: Priority
    classification: str
    engine: str
    """``ffmpeg``"""
    source: GeneratedInput | FileInput | UrlInput
    output: Path | StreamOutput | None
    """Where the job wants its output; None is the default path under the work directory."""
    muxer: str
    """ffmpeg's name of the container, by the output's suffix."""
    encoder: str
    bitrate_bps: int
    preset: str | None
    """None where the encoder has no presets."""
    tune: str | None
    threads: int
    hwaccel: str | None
    duration_sec: float | None
    """Of the output, None is the whole input."""
    scale: tuple[int, int] | None
    """Width and height that a given input is scaled to."""
    frame_rate: float | None
    """The output's frame rate; None keeps the input's."""
    limits: Limits
    notes: tuple[str, ...] = ()
    """For the log: limits that were lowered, parameters that were ignored."""

    @property
    def network_needed(self) -> bool:
        """Whether the job itself reads from a network or writes to one."""
        return isinstance(self.source, UrlInput) or isinstance(self.output, StreamOutput)

    @property
    def gpu_needed(self) -> bool:
        """Whether the job itself needs the devices of a GPU."""
        return self.hwaccel is not None or is_hardware(self.encoder)
