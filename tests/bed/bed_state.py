"""What is known about the beds of this machine: one folder each, while it exists.

/run/ffmpeg-worker-bed/NAME/
    bed.json     what was asked for, and the processes that belong to it
    console.log  what the supervisor and early systemd say
    dbus/        /run/dbus inside: the bed's system bus, reachable from outside
    upper, root  mount points, used only in the bed's own mount namespace
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import bed_cgroups
from bed_cgroups import Hierarchy
from bed_kernel import BedError, Process

FOLDER = Path("/run/ffmpeg-worker-bed")


@dataclass(frozen=True, slots=True)
class State:
    """One bed. Every change is written at once, so that a crash leaves a way to clean up."""

    name: str
    owner: Process  # while the bed comes up: who is at it; then its supervisor
    init: Process | None = None  # the bed's PID 1, as the host sees it
    hierarchies: list[Hierarchy] = field(default_factory=list)
    binds: list[tuple[str, str, bool]] = field(default_factory=list)  # from, to, read-only
    host_network: bool = False
    tied: bool = False  # the bed ends when the supervisor's stdin does

    @property
    def folder(self) -> Path:
        """The bed's folder."""
        return FOLDER / self.name

    @property
    def up(self) -> bool:
        """Whether the bed's PID 1 runs."""
        return self.init is not None and self.init.alive

    def write(self, **changes: Any) -> State:
        """Save the state with these fields changed."""
        changed = replace(self, **changes)
        values = asdict(changed)
        draft = self.folder / "bed.json.new"
        draft.write_text(json.dumps(values))
        draft.rename(self.folder / "bed.json")
        return changed


def read(name: str) -> State | None:
    """The bed called `name`, up or left over; None if there is none."""
    try:
        values = json.loads((FOLDER / name / "bed.json").read_text())
    except FileNotFoundError:
        return None
    values["owner"] = Process(**values["owner"])
    values["init"] = values["init"] and Process(**values["init"])
    values["hierarchies"] = [Hierarchy(**hierarchy) for hierarchy in values["hierarchies"]]
    values["binds"] = [tuple(bind) for bind in values["binds"]]
    return State(**values)


def names() -> list[str]:
    """All beds there are, up or left over."""
    return sorted(path.name for path in FOLDER.iterdir()) if FOLDER.is_dir() else []


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """One at a time: nobody makes or removes beds meanwhile, in whatever process."""
    # The lock is on /run itself: a lock file of ours would be one more thing to leave behind.
    fd = os.open(FOLDER.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def claim(state: State) -> None:
    """Take the name; what a crash left under it is removed. Raises BedError if it is in use."""
    with lock():
        remove_if_dead(state.name)
        if state.folder.exists():
            raise BedError(
                f"there already is a bed called {state.name}: "
                f"choose another name, or end it with `bed.py down {state.name}`"
            )
        state.folder.mkdir(parents=True)
        state.write()
        for folder in ("dbus", "upper", "root"):
            (state.folder / folder).mkdir()


def remove_if_dead(name: str) -> bool:
    """Remove what is left of a bed that nobody takes care of any more. Call it locked."""
    state = read(name)
    if state is None:
        # Claimed by somebody who was killed before the first write.
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        _remove_folder()
        return True
    if state.owner.alive or state.up:
        return False
    remove(state)
    return True


def remove(state: State) -> None:
    """Remove a bed whose processes are gone. Call it locked."""
    bed_cgroups.remove(state.hierarchies, state.name)
    shutil.rmtree(state.folder, ignore_errors=True)
    _remove_folder()


def _remove_folder() -> None:
    if FOLDER.is_dir() and not names():
        FOLDER.rmdir()
