"""Takes over units that an earlier agent has started.

Promises: nothing is started and nothing is stopped here, and an end announced while a unit is
being looked at is not missed: it is tracked first and read then.
"""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace

from worker.errors import BusGone, SystemdError, UnitExists
from worker.systemd.launch import Launch
from worker.systemd.launcher import Launcher
from worker.systemd.state import UnitState
from worker.systemd.tracker import Tracked, parse_row
from worker.systemd.unit import Unit

_NOTHING = UnitState()
# One Get each: GetAll brings 300 properties and takes longer than all of these.
_RUNNING = ("MainPID", "ExecMainStartTimestampMonotonic", "ControlGroup")
_ENDED = ("Result", "ExecMainCode", "ExecMainStatus", "ExecMainExitTimestampMonotonic")


async def adopt(launcher: Launcher, launch: Launch, *, output_begin: int = 0) -> Unit | None:
    """Take over ``launch.unit``; None if it is not loaded.

    ``launch`` is what it was started with, and ``output_begin`` the size that the file for
    standard output had before. The unit may be about to start, run, end or have ended: what is
    returned behaves as if it came from ``launcher.start()``, and a start under way is waited for
    as there. Only its ``started`` is told from the exit status, because how its start job ended
    is not known any more.

    Losses of the bus are waited out. Raises UnitExists if this launcher has the unit already,
    and BusGone if the launcher is closed meanwhile.
    """
    if launcher.tracker.get(launch.unit) is not None:
        raise UnitExists(f"{launch.unit} is in the hands of this agent already")
    tracked = launcher.tracker.track(launch.unit)
    tracked.output_begin = output_begin
    try:
        found = await _follow(launcher, tracked, launcher.control_group(launch))
    except BaseException:
        launcher.tracker.forget(tracked)
        raise
    if not found:
        launcher.tracker.forget(tracked)
        return None
    if launcher.tracker.get(launch.unit) is not tracked:
        raise BusGone(f"{launch.unit}: the launcher was closed before the unit was taken over")
    return Unit(launcher, launch, tracked)


async def _follow(launcher: Launcher, tracked: Tracked, control_group: str) -> bool:
    """Have the unit followed from where it is now. False if it is not loaded.

    ``control_group`` is where its cgroup was, if it has ended: systemd does not tell it any more.
    """
    state = await _place(launcher, tracked)
    if state.load_state == "not-found":
        return False
    if state.job_id and state.active_state in ("inactive", "activating"):
        launcher.tracker.arm(tracked)
        await tracked.job_done.wait()
        state = await _place(launcher, tracked)
    try:
        state = state.folded(await _read(launcher, tracked, state))
    except BusGone:
        raise
    except SystemdError:
        if (await _place(launcher, tracked)).load_state != "not-found":
            raise
        # Gone since we looked first. What signals have told of its end is all there is.
    state = _newer(tracked.live, state)
    tracked.live = replace(state, control_group=state.control_group or control_group)
    launcher.tracker.arm(tracked)
    return True


async def _read(launcher: Launcher, tracked: Tracked, state: UnitState) -> dict[str, object]:
    running = state.active_state == "active" and not state.finished
    names = _RUNNING if running else (*_RUNNING, *_ENDED)
    values = await asyncio.gather(*(launcher.read(tracked.path, "Service", name) for name in names))
    return dict(zip(names, values, strict=True))


async def _place(launcher: Launcher, tracked: Tracked) -> UnitState:
    (rows,) = await launcher.repeat("ListUnitsByNames", "as", [tracked.name])
    assert isinstance(rows, list)
    return _NOTHING.folded(parse_row(rows[0]))


def _newer(announced: UnitState, read: UnitState) -> UnitState:
    """What was read, with all that has been announced since tracking began on top of it.

    An announcement may be handled before the answer that it came after.
    """
    told = {field.name: getattr(announced, field.name) for field in fields(announced)}
    new = {name: value for name, value in told.items() if value != getattr(_NOTHING, name)}
    # Signals tell of the service; where the unit is, is read.
    where = {name: getattr(read, name) for name in ("load_state", "active_state", "sub_state")}
    return replace(read, **{**new, **where, "job_id": read.job_id})
