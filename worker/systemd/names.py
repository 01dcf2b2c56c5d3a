"""Names: from a job id to unit, slice, cgroup and object path. Pure.

A job id comes from outside and may be any text. Two ids must never share a unit (one would stop
the other's process) nor a folder, so the mapping is one to one.
"""

from __future__ import annotations

import hashlib
import re
from enum import StrEnum

UNIT_PREFIX = "ffmpeg-job-"
JOB_UNITS = f"{UNIT_PREFIX}*.service"
"""Pattern of all units of jobs."""
MAX_LENGTH = 100
"""Longest result of safe_id()."""

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
_MAPPED = re.compile(r"-h[0-9a-f]{64}\Z")
_RESERVED_START = "attached"
# systemd.unit(5): a name that ends so is taken for a unit of that type.
_UNIT_TYPES = (
    ".service", ".socket", ".device", ".mount", ".automount", ".swap", ".target", ".path",
    ".timer", ".slice", ".scope",
)  # fmt: skip
_QUEUES = frozenset({"live", "default", "batch"})


class Step(StrEnum):
    """A job takes up to three units, one a step."""

    MAIN = "main"
    INPUT = "input"
    PROBE = "probe"

    @property
    def suffix(self) -> str:
        """What the unit name has after the id."""
        return "" if self is Step.MAIN else f"-{self.value}"


_RESERVED_ENDS = tuple(step.suffix for step in Step if step.suffix)


def safe_id(job_id: str) -> str:
    """The id as a unit name and a folder can carry it, at most MAX_LENGTH characters.

    An ordinary id stays as it is. Any other becomes a readable rest of it and the SHA-256 of the
    whole. Nothing is kept that looks like a result of this mapping, like a step of another job
    (``x-input``) or like the scope of an attached process (``attached-…``).
    """
    if (
        _PLAIN.fullmatch(job_id)
        and not job_id.endswith((*_RESERVED_ENDS, *_UNIT_TYPES))
        and not job_id.startswith(f"{_RESERVED_START}-")
        and not _MAPPED.search(job_id)
    ):
        return job_id
    # Lone surrogates have no UTF-8 form; surrogatepass gives each its own bytes all the same.
    digest = hashlib.sha256(job_id.encode("utf-8", "surrogatepass")).hexdigest()
    rest = re.sub(r"[^A-Za-z0-9_.-]+", "_", job_id[:200]).lstrip("_.-")[:30]
    if not rest or rest.startswith(_RESERVED_START):
        rest = f"id{rest}"
    return f"{rest}-h{digest}"


def unit_name(job_id: str, step: Step = Step.MAIN) -> str:
    """``ffmpeg-job-<id>[-input|-probe].service``"""
    return f"{UNIT_PREFIX}{safe_id(job_id)}{step.suffix}.service"


def slice_name(queue: str) -> str:
    """The slice of a queue: live, default or batch."""
    if queue not in _QUEUES:
        raise ValueError(f"no slice for queue {queue!r}: use one of {', '.join(sorted(_QUEUES))}")
    return f"ffmpeg-{queue}.slice"


def slice_cgroup(slice: str) -> str:  # noqa: A002 - systemd's own word
    """Where a slice lies below the manager's own cgroup.

    Dashes are levels (systemd.slice(5)): ``a-b.slice`` lies in ``a.slice``; the root, ``-.slice``,
    is the empty path.
    """
    stem = slice.removesuffix(".slice")
    if stem == "-":
        return ""
    parts = stem.split("-")
    return "".join(f"/{'-'.join(parts[: i + 1])}.slice" for i in range(len(parts)))


def object_path(unit: str) -> str:
    """The D-Bus object path of a unit (sd_bus_path_encode(3))."""
    return f"/org/freedesktop/systemd1/unit/{_label(unit)}"


def _label(text: str) -> str:
    if not text:
        return "_"
    return "".join(
        chr(byte)
        if (chr(byte).isascii() and chr(byte).isalpha()) or (48 <= byte <= 57 and index > 0)
        else f"_{byte:02x}"
        for index, byte in enumerate(text.encode("utf-8", "surrogatepass"))
    )
