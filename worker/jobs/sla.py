"""Did the platform keep its promise? A judgement on us, not on the job."""

from __future__ import annotations

from dataclasses import dataclass

from worker.errors import Reason
from worker.jobs.outcome import Outcome

MAX_QUEUE_SEC = 30.0
MAX_PROCESSING_SEC = 600.0
SHORT_SEC = 10.0
_UNWORTHY = ("test", "benchmark", "debug")


@dataclass(frozen=True, slots=True)
class Sla:
    worthy: bool
    """Whether the job counts at all."""
    category: str
    """``production``, ``test``, ``benchmark``, ``debug`` or ``batch``"""
    compliant: bool
    reason: str
    """A word that dashboards group by."""


def sla(
    *,
    classification: str,
    scenario: str,
    duration_sec: float | None,
    queue: str,
    priority: str,
    outcome: Outcome,
    queue_sec: float | None,
    processing_sec: float,
) -> Sla:
    """``duration_sec`` is what the job asked for; None (the whole input) counts as long."""
    category = _category(classification.lower(), scenario.lower(), duration_sec, queue, priority)
    if category != "production":
        return Sla(False, category, True, "not_sla_worthy")
    compliant, reason = _kept(outcome, queue_sec, processing_sec)
    return Sla(True, category, compliant, reason)


def _category(
    classification: str, scenario: str, duration_sec: float | None, queue: str, priority: str
) -> str:
    if classification == "production":
        return "production"
    if classification in _UNWORTHY:
        return classification
    for word in _UNWORTHY:
        if scenario.startswith(word):
            return word
    if duration_sec is not None and duration_sec < SHORT_SEC:
        return "test"
    if queue == "batch" and priority == "low":
        return "batch"
    return "production"


def _kept(outcome: Outcome, queue_sec: float | None, processing_sec: float) -> tuple[bool, str]:
    if not outcome.completed:
        match outcome.reason:
            case Reason.PLATFORM_ERROR | None:
                return False, "platform_failure"
            case Reason.RESOURCE_ERROR:
                return False, "resource_management_failure"
            case Reason.TIMEOUT if processing_sec > MAX_PROCESSING_SEC:
                return False, "platform_timeout_exceeded"
            case Reason.TIMEOUT:
                return True, "user_timeout_reasonable"
            case Reason.RUNTIME_ERROR:
                return True, "runtime_error_external"
            case _:
                return True, "external_failure_platform_ok"
    if queue_sec is not None and queue_sec > MAX_QUEUE_SEC:
        return False, "queue_time_exceeded"
    if processing_sec > MAX_PROCESSING_SEC:
        return False, "processing_time_exceeded"
    return True, "compliant"
