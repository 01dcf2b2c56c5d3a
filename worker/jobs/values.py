"""Typed readers for values that came from outside: a value, or a JobError that names the field."""

from __future__ import annotations

import math
from collections.abc import Mapping

from worker.errors import JobError, Reason
from worker.jobs.text import label, shown


def refused(
    field: str, value: object, accepted: str, reason: Reason = Reason.USER_ERROR
) -> JobError:
    """The error that says which value of which field is not accepted, and what is."""
    return JobError(reason, f"{field} = {shown(value)}: {accepted}")


def mapping(value: object, field: str) -> Mapping[str, object]:
    """A JSON object; null and absent are an empty one."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return value
    raise refused(field, value, "must be an object")


def string(value: object, field: str) -> str | None:
    """A string without blanks around it; null, absent and the empty string are None."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise refused(field, value, "must be a string")
    return value.strip() or None


def name(value: object, field: str) -> str | None:
    """Like ``string``, in small letters."""
    text = string(value, field)
    return None if text is None else text.lower()


def integer(value: object, field: str, low: int, high: int, unit: str = "") -> int:
    """A whole number within bounds. 200.0 counts as 200: JSON knows no integers."""
    accepted = f"must be a whole number from {low} to {high}{unit}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refused(field, value, accepted)
    if isinstance(value, float) and not value.is_integer():  # NaN and inf are no integers either
        raise refused(field, value, accepted)
    if not low <= value <= high:
        raise refused(field, value, accepted)
    return int(value)


def number(value: object, field: str, low: float, high: float, unit: str = "") -> float:
    """A finite number within bounds."""
    accepted = f"must be a number from {low:g} to {high:g}{unit}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refused(field, value, accepted)
    if isinstance(value, float) and not math.isfinite(value):
        raise refused(field, value, accepted)
    if not low <= value <= high:
        raise refused(field, value, accepted)
    return float(value)


def choices(known: frozenset[str] | tuple[str, ...]) -> str:
    """``one of a, b, c`` for an error sentence."""
    names = sorted(known) if isinstance(known, frozenset) else known
    return label("must be one of " + ", ".join(names), 320)
