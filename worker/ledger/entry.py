"""What is on record of one acceptance, and how it is put into text and read back. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from worker.master.wire import Job, JobResult

EVIDENCE_BYTES = 16 * 1024
"""Most that is kept of an entry's evidence, as JSON."""
LOG_CHARACTERS = 128 * 1024
"""Most that is kept of a result's logs, from their end."""
TEXT_CHARACTERS = 2000
"""Most that is kept of a sentence, and of a text within evidence that is too long as a whole."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class State(StrEnum):
    """How far an acceptance has come. It only moves forward."""

    ACCEPTED = "accepted"
    """Taken from the master; nothing was started."""
    STARTED = "started"
    """A unit was about to be started: it may run, or have run."""
    FINISHED = "finished"
    """The result is on record; the master may not have it yet."""
    SETTLED = "settled"
    """The master has the result, or it is not wanted."""
    REAPED = "reaped"
    """The unit, the folder and all else that was local is gone, too."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A unit that was about to be started. ``asked_at`` is in Unix time."""

    step: str
    unit: str
    asked_at: float
    facts: dict[str, Any]
    """What the caller needs to go on with the unit without having started it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One acceptance. Times are Unix times in seconds, None for what has not happened."""

    id: int
    job: Job
    state: State
    boot_id: str
    """Boot of the machine in which the job was accepted or, later, last started a unit."""
    result: JobResult | None
    steps: Mapping[str, StepRecord]
    settled: str
    """``delivered``, ``dropped``, or empty if it is not settled."""
    why: str
    """Why it was dropped."""
    evidence: dict[str, Any]
    accepted_at: float
    started_at: float | None
    finished_at: float | None
    settled_at: float | None
    reaped_at: float | None


def state_of(
    started_at: float | None,
    finished_at: float | None,
    settled_at: float | None,
    reaped_at: float | None,
) -> State:
    """The furthest that an entry with these times has come."""
    if reaped_at is not None:
        return State.REAPED
    if settled_at is not None:
        return State.SETTLED
    if finished_at is not None:
        return State.FINISHED
    return State.ACCEPTED if started_at is None else State.STARTED


def microseconds(time: datetime | None) -> int | None:
    """A time of the master as a whole number, the same for the same moment in any zone."""
    return None if time is None else (time - _EPOCH) // timedelta(microseconds=1)


def to_json(value: object) -> str:
    """JSON in ASCII, which keeps any text of ours; what JSON cannot hold becomes text."""
    return json.dumps(value, default=str, separators=(",", ":"))


def job_json(job: Job) -> str:
    return to_json(dict(job))


def result_json(result: JobResult) -> str:
    """The result with all that the master is to get.

    Halves of surrogate pairs become question marks, as they do on their way to the master: the
    model would not be read back with them.
    """
    fields = {name: _whole(v) if isinstance(v, str) else v for name, v in result}
    if result.logs is not None:
        fields["logs"] = _whole(result.logs[-LOG_CHARACTERS:])
    return to_json(fields)


def brief_json(result: JobResult) -> str:
    """The result without what only the master needs: for a history."""
    return result_json(result.model_copy(update={"logs": None, "analyzer_output": {}}))


def sentence(text: str) -> str:
    """A text as SQLite can hold it (no halves of surrogate pairs), shortened."""
    return _whole(text[:TEXT_CHARACTERS])


def _whole(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def evidence_json(evidence: Mapping[str, Any]) -> str:
    """The evidence as JSON of at most EVIDENCE_BYTES.

    Where it is too long, long texts in it are cut; where that is not enough, the largest items
    are left out, and ``left_out`` says how many.
    """
    text = to_json(dict(evidence))
    if len(text) <= EVIDENCE_BYTES:
        return text
    items = {key: _clipped(value) for key, value in json.loads(text).items()}
    sizes = {key: len(to_json({key: value})) for key, value in items.items()}
    kept: dict[str, Any] = {}
    room = EVIDENCE_BYTES - len(to_json({"left_out": len(items)}))
    for key in sorted(sizes, key=sizes.__getitem__):
        room -= sizes[key]
        if room < 0:
            break
        kept[key] = items[key]
    if len(kept) < len(items):
        kept["left_out"] = len(items) - len(kept)
    return to_json(kept)


def _clipped(value: Any) -> Any:
    match value:
        case str():
            return value if len(value) <= TEXT_CHARACTERS else f"{value[:TEXT_CHARACTERS]}…"
        case dict():
            return {key: _clipped(item) for key, item in value.items()}
        case list():
            return [_clipped(item) for item in value]
        case _:
            return value
