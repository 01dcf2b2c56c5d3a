"""What a job is called and where it stands, read without any judgement of the job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from worker.errors import JobError
from worker.jobs.spec import Priority, Queue
from worker.jobs.text import label
from worker.jobs.values import name, refused
from worker.master.wire import Job

MAX_DURATION_SEC = 7 * 86400.0
_STREAM_MODES = ("rtmp", "stream")

_Parameters = Mapping[str, Any]
_Rank = TypeVar("_Rank", Queue, Priority)


@dataclass(frozen=True, slots=True)
class Labels:
    """What a job is called and where it stands, known even of a job that cannot be run."""

    scenario: str
    queue: Queue
    priority: Priority
    classification: str
    duration_sec: float | None
    """What the job asks for, None if it does not or that makes no sense."""
    streaming: bool = False


def parse_labels(job: Job) -> Labels:
    """Never raises: what cannot be read has its default."""
    parameters = job.parameters if isinstance(job.parameters, Mapping) else {}
    return Labels(
        scenario=label(job.scenario.strip()) if isinstance(job.scenario, str) else "",
        queue=_member(Queue, job.queue, Queue.DEFAULT),
        priority=_member(Priority, job.priority, Priority.MEDIUM),
        classification=_classification(job, parameters),
        duration_sec=_asked_seconds(parameters),
        streaming=_asks_to_stream(parameters),
    )


def _asks_to_stream(parameters: _Parameters) -> bool:
    try:
        return is_streaming(parameters)
    except JobError:
        return False


def _asked_seconds(parameters: _Parameters) -> float | None:
    _, value = first_of(parameters, "duration", "duration_seconds")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value <= MAX_DURATION_SEC else None


def _member(kind: type[_Rank], value: object, default: _Rank) -> _Rank:
    """A master ranks what it does not know as default and medium; so do we."""
    try:
        return kind(value.strip().lower()) if isinstance(value, str) else default
    except ValueError:
        return default


def _classification(job: Job, parameters: _Parameters) -> str:
    for value in (job.classification, parameters.get("classification")):
        if isinstance(value, str) and value.strip():
            return label(value.strip(), 60)
    return ""


def is_streaming(parameters: _Parameters) -> bool:
    field = "parameters.output_mode"
    mode = name(parameters.get("output_mode"), field)
    if mode not in (None, "file", *_STREAM_MODES):
        raise refused(field, mode, "must be one of file, rtmp, stream")
    return mode in _STREAM_MODES


def first_of(parameters: _Parameters, *fields: str) -> tuple[str, object]:
    for field in fields:
        if parameters.get(field) is not None:
            return f"parameters.{field}", parameters[field]
    return f"parameters.{fields[0]}", None
