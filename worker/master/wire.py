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


MOST_CHARACTERS = 128 * 1024
"""In all that decides how a job is run, names of fields included."""
MOST_PARTS = 4_000
"""Values in it. With both, a job takes less than a megabyte of memory, and a hundred may wait."""
DEEPEST = 64
_LONGEST_TEXT = 1024
_LARGEST_COUNT = 2**53
"""From here on JSON's numbers are no longer told apart by every program (RFC 8259, 6)."""


def _text(value: object) -> str:
    if not isinstance(value, str):
        return ""
    return value[:_LONGEST_TEXT].encode("utf-8", "replace").decode()


def _count(value: object) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value <= _LARGEST_COUNT else None


def _time(value: object) -> datetime | None:
    """Go's RFC 3339 with 0 to 9 fractional digits; its zero time and anything else are None."""
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
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

    @property
    def counts_retries(self) -> bool:
        """The master said which retry it is: else one acceptance cannot be told from the next."""
        return "retry_count" in self.model_fields_set


_JUDGED = (
    "scenario", "engine", "classification", "parameters", "resource_limits",
    "wrapper_constraints", "queue", "priority",
)  # fmt: skip


def bounded(job: Job) -> Job:
    """The job, or one in its place that can only fail, if it is too large to be kept.

    Its parameters are then a sentence that says so, which no job can be run with.
    """
    trouble = _too_much([getattr(job, name) for name in _JUDGED])
    if not trouble:
        return job
    return job.model_copy(update={**dict.fromkeys(_JUDGED), "scenario": "", "parameters": trouble})


def _too_much(value: object) -> str:
    """What there is too much of in JSON data, found without recursion; empty if nothing."""
    parts = characters = 0
    layer = [value]
    for _ in range(DEEPEST + 1):
        below: list[object] = []
        for item in layer:
            parts += 1
            if isinstance(item, str):
                characters += len(item)
            elif isinstance(item, int):
                characters += item.bit_length() // 3
            elif isinstance(item, dict):
                characters += sum(map(len, item))
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            if parts + len(below) > MOST_PARTS:
                return f"a job of more than {MOST_PARTS} values, too many for this node"
        if characters > MOST_CHARACTERS:
            return f"a job of more than {MOST_CHARACTERS} characters, too long for this node"
        if not below:
            return ""
        layer = below
    return f"a job nested more than {DEEPEST} levels deep, too deep for this node"


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
