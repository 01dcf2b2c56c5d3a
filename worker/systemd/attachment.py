"""What an attachment is: which processes may be attached, under which limits, as what unit."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from worker.errors import WorkerError
from worker.systemd.names import UNIT_PREFIX, slice_name
from worker.systemd.processes import InForce, Process, Processes
from worker.systemd.property import Property

ATTACHED_SCOPES = f"{UNIT_PREFIX}attached-*.scope"
"""Pattern of the scopes that attach() makes."""
RUNTIME_LIMIT_SINCE = 244
"""The systemd that can end a scope after a time (RuntimeMaxSec= in systemd.scope(5))."""
_WORKER = "ffmpeg-worker.service"
NO_LIMIT = 2**64 - 1
"""How systemd writes "infinity"."""
USEC = 1_000_000
_STOP_TIMEOUT_SEC = 10


class AttachError(WorkerError):
    """A process cannot be attached or detached. Says which one, why, and what to do."""


@dataclass(frozen=True, slots=True)
class ScopeLimits:
    """What an attached process may use, together with its descendants; None sets no limit."""

    cpu_percent: int | None = None
    """100 is one core."""
    memory_bytes: int | None = None
    """Of what is allocated from now on."""
    runtime_sec: int | None = None
    """From the attachment; then SIGTERM, and SIGKILL ten seconds later."""


@dataclass(frozen=True, slots=True)
class Attached:
    unit: str
    process: Process
    pids: frozenset[int]
    """All processes in the scope."""
    outside: frozenset[int]
    """Descendants that could not be moved, forking faster than we look."""
    held_bytes: int
    """Memory that the processes held before; it stays charged to where they came from."""
    came_from: str
    """The service or scope that the process was in; may be empty."""
    in_force: InForce
    runtime_sec: float | None


@dataclass(frozen=True, slots=True)
class Detached:
    unit: str
    """Where the processes are now, without limits; empty if they ended meanwhile."""
    pids: frozenset[int]


def scope_name(pid: int) -> str:
    return f"{UNIT_PREFIX}attached-{pid}.scope"


def scope_properties(pids: Iterable[int], description: str) -> list[Property]:
    """A scope that limits nothing and goes with its last process.

    Delegate= is what lets processes be added to a running unit (AttachProcessesToUnit).
    """
    return [
        Property("Description", "s", description, optional=True),
        Property("PIDs", "au", list(pids)),
        Property("Delegate", "b", True),
        Property("CollectMode", "s", "inactive-or-failed", optional=True),
        # the default is a limit too, and nobody has asked for one
        Property("TasksMax", "t", NO_LIMIT, optional=True),
        # Who started the processes sees one of them killed, and knows best what follows.
        Property("OOMPolicy", "s", "continue", optional=True),
    ]


def limit_properties(limits: ScopeLimits) -> list[Property]:
    """The limits, and what systemctl status needs to show the use."""
    result = [
        Property("Slice", "s", slice_name("default")),
        Property("CPUAccounting", "b", True, optional=True),
        Property("MemoryAccounting", "b", True, optional=True),
        Property("IOAccounting", "b", True, optional=True),
        Property("TasksAccounting", "b", True, optional=True),
        # systemd stops scopes when the machine goes down, as it would have without us
        Property("TimeoutStopUSec", "t", _STOP_TIMEOUT_SEC * USEC),
    ]
    if limits.cpu_percent is not None:
        result.append(Property("CPUQuotaPerSecUSec", "t", limits.cpu_percent * 10_000))
    if limits.memory_bytes is not None:
        result.append(Property("MemoryMax", "t", limits.memory_bytes))
        result.append(Property("MemorySwapMax", "t", 0))
    if limits.runtime_sec is not None:
        result.append(Property("RuntimeMaxUSec", "t", limits.runtime_sec * USEC))
    return result


def attachable(look: Processes, pid: int) -> list[Process]:
    """The process and its descendants, if they may be attached. Raises AttachError."""
    if pid == 1:
        raise AttachError("process 1 is the service manager of the machine: it takes no limits")
    family = look.family(pid)
    if not family:
        raise AttachError(f"no process has the PID {pid}: see ps -e for those that run")
    if look.owner(pid) != pid:
        raise AttachError(f"{pid} is a thread: attach its process, {look.owner(pid)}")
    if family[0].kernel:
        raise AttachError(f"{pid} ({family[0].name}) is a thread of the kernel: it has no limits")
    for member in family:
        who = f"process {pid}" if member.pid == pid else f"its child {member.pid}"
        if member.pid == os.getpid():
            raise AttachError(
                f"process {pid} is this command itself"
                if member.pid == pid
                else f"process {pid} runs this command, which would be limited too:"
                " run it from another shell"
            )
        unit = look.unit(member.pid)
        if unit.startswith(UNIT_PREFIX):
            raise AttachError(f"{who} is in {unit} already: {_way_out(unit)}")
        if unit == _WORKER:
            raise AttachError(f"{who} is the worker ({unit}): use systemctl set-property {unit}")
        if look.is_apart(member.pid):
            raise AttachError(
                f"{who} is in a container (another namespace): limit it by what runs the container"
            )
    return family


def not_attached(look: Processes, pid: int) -> str:
    """Why there is nothing to detach under this PID, and what to do."""
    unit = look.unit(pid)
    if unit == scope_name(pid):
        return (
            f"process {pid} is attached in another service manager: try it with --user, or without"
        )
    if unit.startswith(UNIT_PREFIX):
        return f"process {pid} is not attached by itself but is in {unit}: {_way_out(unit)}"
    return f"process {pid} is not attached: systemctl list-units '{ATTACHED_SCOPES}' shows what is"


def _way_out(unit: str) -> str:
    number = unit.removeprefix(f"{UNIT_PREFIX}attached-").removesuffix(".scope")
    if number.isdigit():
        return f"ffmpeg-worker detach {number} comes first"
    return "it is a job of the worker, and limited as such"
