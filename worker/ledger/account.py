"""An entry of the ledger as it may be shown: complete, and without what is secret. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from worker.jobs.text import redact
from worker.ledger.entry import Entry
from worker.master.wire import Job

HIDDEN = "***"
_SHOWN = frozenset(
    {"input", "output", "output_mode", "rtmp_url", "codec", "bitrate", "preset", "resolution"}
    | {"resolution_width", "resolution_height", "duration", "duration_seconds", "frame_rate"}
    | {"fps", "hwaccel", "threads", "tune", "engine", "classification"}
)
"""Parameters whose value is shown. Under any other name it may be anything, a key as well."""
_LEAST_SECRET = 4
"""Shorter keys are left where other texts have them: they would be found in any word."""


def account(entry: Entry) -> dict[str, Any]:
    """All that is known of an acceptance, for JSON. Times are in UTC, as in RFC 3339.

    Texts are as they came, control characters included; secrets are replaced by ``***``.
    """
    job, result = entry.job, entry.result
    told: dict[str, Any] = {
        "entry": entry.id,
        "job_id": job.id,
        "retry": job.retry_count,
        "state": entry.state.value,
        "accepted_at": _time(entry.accepted_at),
        "started_at": _time(entry.started_at),
        "finished_at": _time(entry.finished_at),
        "settled_at": _time(entry.settled_at),
        "reaped_at": _time(entry.reaped_at),
        "seconds": None
        if entry.finished_at is None
        else round(entry.finished_at - entry.accepted_at, 3),
        "status": result.status if result else None,
        "error": result.error if result else None,
        "settled": entry.settled or None,
        "why": entry.why or None,
        "boot_id": entry.boot_id,
        "steps": [
            {
                "step": step.step,
                "unit": step.unit,
                "asked_at": _time(step.asked_at),
                "facts": step.facts,
            }
            for step in entry.steps.values()
        ],
        "metrics": result.metrics if result else {},
        "evidence": entry.evidence,
    }
    shown: dict[str, Any] = _cleared(told, _secrets(job))
    # Last, for what is hidden there is hidden by its name.
    return {**shown, "job": _job(job)}


def _job(job: Job) -> dict[str, Any]:
    """What was asked for."""
    return {
        "created_at": job.created_at.astimezone(UTC).isoformat() if job.created_at else None,
        "sequence_number": job.sequence_number,
        "node_id": job.node_id,
        "max_retries": job.max_retries,
        "queue": _text(job.queue),
        "priority": _text(job.priority),
        "scenario": _text(job.scenario),
        "parameters": _parameters(job.parameters),
        "resource_limits": _limits(job.resource_limits),
        "wrapper_constraints": _limits(job.wrapper_constraints),
    }


def _parameters(value: object) -> Any:
    if value is None or not isinstance(value, Mapping):
        return None if value is None else HIDDEN
    shown: dict[str, Any] = {}
    for name, item in value.items():
        if name == "resource_limits":
            shown[name] = _limits(item)
        elif name == "rtmp_url" and "://" not in str(item):
            shown[name] = HIDDEN  # as it is no URL, nobody can say where in it the key is
        elif name in _SHOWN and (item is None or isinstance(item, str | int | float)):
            shown[name] = redact(item) if isinstance(item, str) else item
        else:
            shown[str(name)] = HIDDEN
    return shown


def _limits(value: object) -> Any:
    """Limits are numbers."""
    if isinstance(value, Mapping):
        return {str(name): _limits(item) for name, item in value.items()}
    return value if value is None or isinstance(value, int | float) else HIDDEN


def _text(value: object) -> str | int | None:
    if isinstance(value, str):
        return redact(value)
    return None if value is None or not isinstance(value, int) else value


def _secrets(job: Job) -> list[str]:
    """Keys of the job's stream, which other texts may repeat; the longest first."""
    asked = job.parameters if isinstance(job.parameters, Mapping) else {}
    found = {str(asked.get("stream_key") or "")}
    if isinstance(url := asked.get("rtmp_url"), str):
        path, _, query = url.partition("://")[2].partition("?")
        place, slash, name = path.rstrip("/").rpartition("/")
        # "rtmp://host/app" alone names no stream.
        found |= {query, name if slash and "/" in place else ""}
    found |= {quote(key, safe="", errors="replace") for key in found}
    return sorted((key for key in found if len(key) >= _LEAST_SECRET), key=len, reverse=True)


def _cleared(value: Any, secrets: list[str]) -> Any:
    match value:
        case str():
            text = redact(value)
            for secret in secrets:
                text = text.replace(secret, HIDDEN)
            return text
        case Mapping():
            return {key: _cleared(item, secrets) for key, item in value.items()}
        case list():
            return [_cleared(item, secrets) for item in value]
        case _:
            return value


def _time(unix: float | None) -> str | None:
    if unix is None:
        return None
    return datetime.fromtimestamp(unix, UTC).isoformat(timespec="milliseconds")
