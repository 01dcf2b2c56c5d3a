"""The agent as it is, but that it dies where the driver has ordered it to.

Started by systemd instead of ``ffmpeg-worker``. The calls at whose begin or end there is a step
boundary are wrapped from outside, so nothing in the program knows of it.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a program
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.chaos import points
from worker import __main__, jobfiles, recovery, steps, workspace
from worker.execution import Execution
from worker.ledger import Ledger, reading
from worker.master.client import MasterClient
from worker.master.delivery import Delivery
from worker.systemd.bus import Bus
from worker.systemd.launcher import Launcher
from worker.systemd.names import UNIT_PREFIX
from worker.systemd.unit import Unit

Subject = tuple[str, str]
"""Of a call: the job's id, empty where it is about no job, and the step."""
NOBODY: Subject = ("", "")


def of_unit(name: str) -> Subject:
    stem = name.removeprefix(UNIT_PREFIX).removesuffix(".service")
    for step in (points.INPUT, points.PROBE):
        if stem.endswith(f"-{step}"):
            return stem.removesuffix(f"-{step}"), step
    return stem, points.MAIN


def of_entry(ledger: Ledger, entry_id: int) -> Subject:
    with ledger._file.reading() as db:
        return reading.entry(db, entry_id).job.id, ""


def transient(call: tuple[Any, ...]) -> Subject | None:
    """Of a D-Bus call, if it is the one that starts a unit."""
    return of_unit(call[3][0]) if call[1] == "StartTransientUnit" else None


TARGETS: dict[str, tuple[Any, str, Callable[[tuple[Any, ...], Any], Subject | None]]] = {
    "next_job": (MasterClient, "next_job", lambda call, job: (job.id, "") if job else None),
    "register": (MasterClient, "register", lambda call, _: NOBODY),
    "deliver": (Delivery, "attempt", lambda call, _: (call[0]._job.id, "")),
    "post_result": (MasterClient, "post_result", lambda call, _: (call[1].job_id, "")),
    "accept": (Ledger, "accept", lambda call, _: (call[1].id, "")),
    "starting": (Ledger, "starting", lambda call, _: of_unit(call[3])),
    "finish": (Ledger, "finish", lambda call, _: (call[2].job_id, "")),
    "settle": (Ledger, "settle", lambda call, _: of_entry(call[0], call[1])),
    "transient": (Bus, "call", lambda call, _: transient(call)),
    "start": (Launcher, "start", lambda call, _: of_unit(call[1].unit)),
    "finished": (Unit, "finished", lambda call, _: of_unit(call[0].name)),
    "adopt": (steps, "adopt", lambda call, _: of_unit(call[1].unit)),
    "publishing": (workspace.Workspace, "publishing", lambda call, _: (call[0].path.name, "")),
    "publish": (jobfiles, "publish", lambda call, _: (call[0].parent.name, "")),
    "remove": (workspace.Workspace, "remove", lambda call, _: (call[0].path.name, "")),
    "release": (Execution, "release", lambda call, _: (call[0].job.id, "")),
    "recovery": (recovery.Recovery, "look", lambda call, _: NOBODY),
}


def wrap(target: str) -> None:
    owner, name, subject = TARGETS[target]
    original = getattr(owner, name)

    def moment(after: bool, call: tuple[Any, ...], answer: Any = None) -> None:
        order = points.armed()
        if order is None:
            return
        point = points.BY_NAME[order.point]
        if point.target != target or point.after != after:
            return
        found = subject(call, answer)
        if found is None:
            return
        job, step = found
        wanted = order.job in (points.ANY, job) or not job
        if wanted and point.step in ("", step) and points.take():
            die_in(point.delay)

    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def call_async(*args: Any, **options: Any) -> Any:
            moment(False, args)
            answer = await original(*args, **options)
            moment(True, args, answer)
            return answer

        setattr(owner, name, call_async)
    else:

        @functools.wraps(original)
        def call_plain(*args: Any, **options: Any) -> Any:
            moment(False, args)
            answer = original(*args, **options)
            moment(True, args, answer)
            return answer

        setattr(owner, name, call_plain)


def die_in(seconds: float) -> None:
    if seconds:
        threading.Timer(seconds, die).start()
    else:
        die()


def die() -> None:
    points.fire()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    for target in TARGETS:
        wrap(target)
    sys.exit(__main__.main())
