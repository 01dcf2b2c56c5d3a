"""What became of a job or of one of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from worker.errors import JobError, Reason
from worker.jobs.text import redact, shortened, without_requeue_words
from worker.printable import escape

_OWN_FAULT = frozenset(
    {Reason.USER_ERROR, Reason.INPUT_ERROR, Reason.CAPABILITY_MISMATCH}
    # What ffmpeg said is quoted here, too, and a hostile input may have had the words put in.
    | {Reason.RUNTIME_ERROR, Reason.RESOURCE_ERROR}
)
_ERROR_LIMIT = 1000


class Intent(StrEnum):
    """What we ourselves had in mind with the unit when it ended.

    systemd's Result cannot tell it: a unit stopped by us may read success or exit-code.
    """

    NONE = "none"
    CANCELLED = "cancelled"
    GONE = "gone"
    """The job is no longer this node's."""
    SHUTDOWN = "shutdown"
    """The worker is being stopped."""
    POWEROFF = "poweroff"
    """The machine is being stopped, and every unit with it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict. ``reason`` is None if and only if ``completed``."""

    completed: bool
    reason: Reason | None = None
    message: str = ""
    """A sentence that a person can act on, with ffmpeg's own last error line."""

    @classmethod
    def failed(cls, reason: Reason, message: str) -> Outcome:
        return cls(False, reason, message)

    @classmethod
    def of(cls, error: JobError) -> Outcome:
        return cls(False, error.reason, error.message)


COMPLETED = Outcome(True)


def stopped(intent: Intent) -> Outcome:
    """The job was ended by ourselves."""
    if intent is Intent.CANCELLED:
        return Outcome.failed(Reason.PLATFORM_ERROR, "the job was cancelled")
    if intent is Intent.GONE:
        return Outcome.failed(Reason.PLATFORM_ERROR, "the job is no longer this node's")
    if intent is Intent.POWEROFF:
        return Outcome.failed(
            Reason.PLATFORM_ERROR, "the machine was shut down before the job was done; run it again"
        )
    return Outcome.failed(
        Reason.PLATFORM_ERROR, "the worker was stopped before the job was done; run it again"
    )


def error_text(outcome: Outcome) -> str | None:
    """The result's ``error``: the reason, then the sentence; None for a completed job.

    A master runs a failed job again when certain words stand in its error. They are broken up
    where the job itself is to blame, so that it is not run in vain.
    """
    if outcome.completed:
        return None
    reason = outcome.reason or Reason.PLATFORM_ERROR
    text = shortened(f"{reason.value}: {escape(redact(outcome.message))}", _ERROR_LIMIT)
    return without_requeue_words(text) if reason in _OWN_FAULT else text
