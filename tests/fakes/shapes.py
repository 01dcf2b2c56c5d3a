"""What the demo master's JSON looks like, as a Go program writes and reads it."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

Data = dict[str, Any]


class RefusedError(Exception):
    """An error answer: status and plain text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


def go_time(seconds: float) -> str:
    """As Go writes it: the local zone, up to nine digits of a second, no zero at the end."""
    whole, nanoseconds = divmod(int(seconds * 1_000_000_000), 1_000_000_000)
    local = datetime.fromtimestamp(whole, UTC).astimezone()
    fraction = f".{nanoseconds:09d}".rstrip("0").rstrip(".")
    zone = local.strftime("%z")
    zone = "Z" if zone == "+0000" else f"{zone[:3]}:{zone[3:]}"
    return f"{local:%Y-%m-%dT%H:%M:%S}{fraction}{zone}"


def facts(request: Data) -> Data:
    names = {
        "address": "", "type": "", "cpu_threads": 0, "cpu_model": "", "has_gpu": False,
        "gpu_type": "", "gpu_capabilities": None, "ram_total_bytes": 0, "labels": None,
    }  # fmt: skip
    return {name: request.get(name, default) for name, default in names.items()}


def present(node: Data) -> Data:
    optional = ("gpu_type", "gpu_capabilities", "labels", "current_job_id")
    return {k: v for k, v in node.items() if v or k not in optional}


def without_blanks(job: Data) -> Data:
    always = ("id", "scenario", "confidence", "status", "created_at", "retry_count")
    return {k: v for k, v in job.items() if k in always or v not in ("", None)}


def typed(request: Data, **types: type) -> None:
    """Unknown fields are ignored, null is absent, and a wrong type spoils the request."""
    for name, kind in types.items():
        value = request.get(name)
        if value is None:
            request.pop(name, None)
        elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise RefusedError(400, "Invalid request body")


def is_rfc3339(text: str) -> bool:
    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"
    return re.fullmatch(pattern, text) is not None
