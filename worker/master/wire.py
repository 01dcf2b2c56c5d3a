"""The master's JSON, as pydantic models: liberal in what is read, exact in what is sent.

A job's fields that decide what is run keep whatever type came (``Any``); they are judged in
``worker.jobs.parse``, so that one bad field fails that job with a clear sentence instead of
making the whole answer unreadable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

_DATETIME: TypeAdapter[datetime] = TypeAdapter(datetime)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _time(value: object) -> datetime | None:
    """Go's RFC 3339 with 0 to 9 fractional digits; its zero time and anything else are None."""
    if not isinstance(value, str):
        return None
    try:
        time = _DATETIME.validate_python(value)
    except ValidationError:
        return None
    if time.tzinfo is None or time.year <= 1:
        return None
    return time


Text = Annotated[str, BeforeValidator(_text)]
Count = Annotated[int | None, BeforeValidator(_count)]
Time = Annotated[datetime | None, BeforeValidator(_time)]


class Job(BaseModel):
    """A job as the master hands it out (``GET /jobs/next``, ``GET /jobs/{…}``)."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: Annotated[str, Field(min_length=1, max_length=1024)]
    sequence_number: Count = None
    status: Text = ""
    node_id: Text = ""
    retry_count: Annotated[int, BeforeValidator(lambda v: _count(v) or 0)] = 0
    max_retries: Count = None
    created_at: Time = None
    started_at: Time = None

    scenario: Any = ""
    engine: Any = None
    classification: Any = None
    parameters: Any = None
    resource_limits: Any = None
    wrapper_constraints: Any = None
    queue: Any = None
    priority: Any = None


class Node(BaseModel):
    """The master's record of us. Only the id matters for what we do."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: Annotated[str, Field(min_length=1, max_length=1024)]
    name: Text = ""
    status: Text = ""


class NodeRegistration(BaseModel):
    """What this machine is, sent to ``POST /nodes/register``."""

    address: str
    type: str
    cpu_threads: int
    cpu_model: str
    has_gpu: bool
    gpu_type: str | None = None
    gpu_capabilities: list[str] | None = None
    ram_total_bytes: int
    labels: dict[str, str] = {}


class JobResult(BaseModel):
    """What became of a job, sent to ``POST /results``."""

    job_id: str
    node_id: str
    status: str
    """``completed`` or ``failed``: the only two that the master understands."""
    progress: int | None = None
    metrics: dict[str, Any] = {}
    analyzer_output: dict[str, Any] = {}
    error: str | None = None
    logs: str | None = None
    completed_at: datetime = Field(default_factory=lambda: datetime.now(UTC))


class ResultAnswer(BaseModel):
    """What the master made of a result (``POST /results``)."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    status: Text = ""
    """``success``, or ``retrying`` when a failed job goes back into the queue."""
    retry: Count = None
    """Number of the retry that follows, where ``status`` is ``retrying``."""
    max_retries: Count = None


def encode(model: NodeRegistration | JobResult) -> bytes:
    """The body of a request: JSON in ASCII, without the fields that are None.

    What JSON cannot carry would make the master refuse the whole report with a 400, and a
    job's log may hold anything. So numbers that are not finite become null, and halves of
    surrogate pairs (file names that are not UTF-8) become question marks.
    """
    fields = {name: value for name, value in model if value is not None}
    return json.dumps(_plain(fields), allow_nan=False, separators=(",", ":")).encode("ascii")


def _plain(value: object) -> object:
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case str():
            return value.encode("utf-8", "replace").decode("utf-8")
        case datetime():
            # Go reads RFC 3339 only, which wants a zone. One without is local time.
            return value.astimezone(UTC).isoformat()
        case Mapping():
            return {str(_plain(str(key))): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case _:
            return _plain(str(value))
