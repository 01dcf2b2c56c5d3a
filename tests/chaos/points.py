"""The moments in the life of a job at which the agent can be made to die."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = Path("/tmp/chaos")
"""Shared by the driver and the agent: the agent's sandbox lets it write below /tmp."""
ARMED, TAKEN, FIRED = FOLDER / "armed", FOLDER / "taken", FOLDER / "fired"
INPUT, MAIN, PROBE = "input", "main", "probe"
ANY = "*"


@dataclass(frozen=True)
class Point:
    """Before or after a call of ``target`` (see ``agent.TARGETS``), for a unit's ``step``."""

    name: str
    text: str
    """When that is, for people: ends the sentence "the agent died …"."""
    target: str
    after: bool = True
    step: str = ""
    delay: float = 0.0
    """Seconds from then."""


def _(name: str, text: str, target: str, when: str, step: str = "", delay: float = 0.0) -> Point:
    return Point(name, text, target, when == "after", step, delay)


POINTS: tuple[Point, ...] = (
    _("handed-out", "when the job was handed out, before it was put on record",
      "next_job", "after"),
    _("accepted", "when the job was on record, before anything was done for it",
      "accept", "after"),
    _("input-before", "before the start of the input was put on record",
      "starting", "before", INPUT),
    _("input-recorded", "when the start of the input was on record, before systemd was asked",
      "starting", "after", INPUT),
    _("input-asked", "when systemd had answered the request to start the input",
      "transient", "after", INPUT),
    _("input-runs", "while the input was generated", "start", "after", INPUT, 0.15),
    _("input-ended", "when the input's unit had ended, before it was judged",
      "finished", "after", INPUT),
    _("main-before", "between input and transcode", "starting", "before", MAIN),
    _("main-recorded", "when the start of the transcode was on record, before systemd was asked",
      "starting", "after", MAIN),
    _("main-asked", "when systemd had answered the request to start the transcode",
      "transient", "after", MAIN),
    _("main-started", "when the transcode was known to run", "start", "after", MAIN),
    _("main-runs", "while the transcode ran", "start", "after", MAIN, 0.5),
    _("main-ended", "when the transcode had ended, before it was judged",
      "finished", "after", MAIN),
    _("probe-before", "before the check of the output", "start", "before", PROBE),
    _("probe-runs", "during the check of the output", "start", "after", PROBE),
    _("probe-ended", "when the check of the output had ended", "finished", "after", PROBE),
    _("publishing", "when it was noted where the output goes, before it was moved there",
      "publishing", "after"),
    _("published", "when the output was in its place, before the result was put on record",
      "publish", "after"),
    _("finish-before", "when the result was known, before it was put on record",
      "finish", "before"),
    _("finished", "when the result was on record", "finish", "after"),
    _("release-before", "before the job's units were dropped", "release", "before"),
    _("released", "when the job's units were dropped", "release", "after"),
    _("look-before", "before the master was asked whether it wants the result",
      "deliver", "before"),
    _("post-before", "before the result was sent", "post_result", "before"),
    _("post-after", "when the master had the result, before its answer was used",
      "post_result", "after"),
    _("folder-removed", "when the job's folder was removed", "remove", "after"),
    _("settle-before", "before it was put on record that the job is done with",
      "settle", "before"),
    _("settled", "when it was on record that the job is done with", "settle", "after"),
)  # fmt: skip

RESTART_POINTS: tuple[Point, ...] = (
    _("again-looked", "and again when it had looked at what was left", "recovery", "after"),
    _("again-register", "and again before it registered", "register", "before"),
    _("again-registered", "and again when it had registered", "register", "after"),
    _("again-adopted", "and again when it followed the transcode", "adopt", "after", MAIN),
)  # fmt: skip
"""These come when the agent starts after a death."""

BY_NAME: Mapping[str, Point] = {point.name: point for point in (*POINTS, *RESTART_POINTS)}


@dataclass(frozen=True)
class Order:
    """What the agent has to do next time: die at ``point``, for ``job`` (an id, or ANY)."""

    point: str
    job: str = ANY


def arm(point: Point, job: str = ANY) -> None:
    """Have the agent die there, once."""
    disarm()
    new = FOLDER / "armed.new"
    new.write_text(json.dumps(asdict(Order(point.name, job))))
    new.rename(ARMED)


def disarm() -> None:
    for path in (ARMED, TAKEN, FIRED):
        path.unlink(missing_ok=True)


def armed() -> Order | None:
    """The order that waits to be carried out."""
    try:
        return Order(**json.loads(ARMED.read_text()))
    except FileNotFoundError:
        return None


def take() -> bool:
    """Carry the order out; False if somebody else does."""
    try:
        ARMED.rename(TAKEN)
    except FileNotFoundError:
        return False
    return True


def fire() -> None:
    """Note the time."""
    TAKEN.rename(FIRED)


def fired() -> float | None:
    """When the agent died of the order (Unix time); None if it has not."""
    try:
        return os.stat(FIRED).st_ctime  # noqa: PTH116
    except FileNotFoundError:
        return None
