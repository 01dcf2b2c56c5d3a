"""``ffmpeg-worker attach`` and ``detach``: limits for a process that runs already."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

from worker.config import Settings
from worker.config.keys import integer
from worker.errors import ConfigError
from worker.node.cpu import usable_cpus
from worker.systemd.attachment import Attached, Detached, ScopeLimits
from worker.systemd.scope import Scopes
from worker.telemetry.host import parse_meminfo

logger = logging.getLogger(__name__)

T = TypeVar("T")

MIB = 1 << 20
_PAGE = 64 * 1024
"""The kernel counts in pages, at most so large."""
_PERCENT = 0.5
_FLAGS: Mapping[str, Callable[[str], int]] = {
    "--cpu-percent": integer(1, 1_000_000, ", 100 is one core"),
    "--memory-mb": integer(16, 1_000_000_000),
    "--timeout": integer(1, 31_536_000, " seconds"),
}


def attach(settings: Settings, pid: str, flags: Mapping[str, str]) -> int:
    """Put process ``pid`` and its descendants under the limits that ``flags`` name.

    What was done goes to stdout, what does not hold to the log. Returns the exit status. Raises
    ConfigError for a PID or limit that is none, WorkerError if the process cannot be attached.
    """
    number = parse_pid(pid)
    limits, notes = lowered(
        parse_limits(flags),
        cpus=usable_cpus(),
        memory_bytes=_meminfo().get("MemTotal", 0),
    )
    for note in notes:
        logger.warning("%s", note)
    done = asyncio.run(_with_scopes(settings, lambda scopes: scopes.attach(number, limits)))
    for trouble in troubles(limits, done, swap_bytes=_meminfo().get("SwapTotal", 0)):
        logger.warning("%s", trouble)
    for line in report(done):
        print(line)
    return 0


def detach(settings: Settings, pid: str) -> int:
    """Lift the limits of what was attached as ``pid``; the processes go on. As attach()."""
    number = parse_pid(pid)
    done: Detached = asyncio.run(_with_scopes(settings, lambda scopes: scopes.detach(number)))
    if done.pids:
        print(f"process {number}: {_count(done.pids)} without limits now, in {done.unit}")
    else:
        print(f"process {number}: it had ended already, nothing is left of its scope")
    return 0


def parse_pid(text: str) -> int:
    """Raises ConfigError."""
    try:
        return integer(1, 2**31 - 1)(text)
    except ValueError as error:
        raise ConfigError(f"PID {text[:40]!r} {error}") from None


def parse_limits(flags: Mapping[str, str]) -> ScopeLimits:
    """Raises ConfigError, one line for each wrong value, or if there is no limit at all."""
    values, errors = {}, []
    for flag, parse in _FLAGS.items():
        if flag not in flags:
            continue
        try:
            values[flag] = parse(flags[flag])
        except ValueError as error:
            errors.append(f"{flag}: {flags[flag][:40]!r} {error}")
    if errors:
        raise ConfigError("\n".join(errors))
    if not values:
        raise ConfigError(f"attach needs a limit: one or more of {', '.join(_FLAGS)}")
    memory = values.get("--memory-mb")
    return ScopeLimits(
        cpu_percent=values.get("--cpu-percent"),
        memory_bytes=None if memory is None else memory * MIB,
        runtime_sec=values.get("--timeout"),
    )


def lowered(
    limits: ScopeLimits, *, cpus: int, memory_bytes: int
) -> tuple[ScopeLimits, tuple[str, ...]]:
    """The limits, none above what the machine has, and what to say about it."""
    notes = []
    cpu, memory = limits.cpu_percent, limits.memory_bytes
    if cpu is not None and cpu > 100 * cpus:
        notes.append(f"CPU limit lowered from {cpu} % to {100 * cpus} %, all that this node has")
        cpu = 100 * cpus
    most = memory_bytes // MIB * MIB
    if memory is not None and 0 < most < memory:
        notes.append(
            f"memory limit lowered from {memory // MIB} MB to {most // MIB} MB,"
            " all that this node has"
        )
        memory = most
    return ScopeLimits(cpu, memory, limits.runtime_sec), tuple(notes)


def troubles(asked: ScopeLimits, done: Attached, *, swap_bytes: int) -> list[str]:
    """What does not hold, or not as one might think; ``swap_bytes`` is what the machine has."""
    found = []
    force = done.in_force
    if asked.cpu_percent is not None and (
        force.cpu_percent is None or abs(force.cpu_percent - asked.cpu_percent) > _PERCENT
    ):
        found.append(_no_hold("CPU", "cpu", force.cpu_percent, "%"))
    if asked.memory_bytes is not None:
        memory = force.memory_bytes
        if memory is None or abs(memory - asked.memory_bytes) > _PAGE:
            mib = None if memory is None else memory / MIB
            found.append(_no_hold("memory", "memory", mib, "MB"))
        elif swap_bytes and force.swap_bytes != 0:
            found.append("swap is not limited here: beyond the memory limit the process is swapped")
        if done.held_bytes >= MIB:
            found.append(
                f"the {done.held_bytes // MIB} MB that the processes hold already are not counted:"
                " the memory limit is for what they allocate from now on"
            )
    if asked.runtime_sec is not None and done.runtime_sec != asked.runtime_sec:
        found.append("the time limit does not hold: systemd has not taken it")
    if done.outside:
        found.append(
            f"{_count(done.outside)} started meanwhile could not be limited: detach"
            f" {done.process.pid} and attach it again"
        )
    return found


def report(done: Attached) -> list[str]:
    """What was done, one fact a line; the limits are those that the kernel has in force."""
    pid = done.process.pid
    came_from = f", from {done.came_from}" if done.came_from else ""
    lines = [f"{done.unit}: {_count(done.pids)} of {done.process.name} ({pid}){came_from}"]
    if (cpu := done.in_force.cpu_percent) is not None:
        lines.append(f"CPU: at most {cpu:g} % of a core, together")
    if (memory := done.in_force.memory_bytes) is not None:
        lines.append(f"memory: at most {memory / MIB:g} MB, together")
    if done.runtime_sec is not None:
        lines.append(f"time: ends in {done.runtime_sec:g} s (SIGTERM, then SIGKILL)")
    lines.append(f"ffmpeg-worker detach {pid} lifts the limits")
    return lines


def _no_hold(what: str, controller: str, value: float | None, unit: str) -> str:
    state = "there is none in force" if value is None else f"{value:g} {unit} are in force"
    return (
        f"the {what} limit does not hold, {state}: does the service manager have the {controller}"
        " controller? (systemctl show -p DelegateControllers user@UID.service)"
    )


def _count(pids: frozenset[int]) -> str:
    return "1 process" if len(pids) == 1 else f"{len(pids)} processes"


def _meminfo() -> dict[str, int]:
    return parse_meminfo(Path("/proc/meminfo").read_text(encoding="ascii", errors="replace"))


async def _with_scopes(settings: Settings, work: Callable[[Scopes], Awaitable[T]]) -> T:
    scopes = Scopes(user=settings.user)
    try:
        await scopes.connect()
        return await work(scopes)
    finally:
        await scopes.close()
