"""Processes that we did not start, as /proc shows them (proc(5)), and the limits they are under.

A process may end, and its PID be given to another, between any two looks. PID and start time
together name a process for good.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from worker.systemd.cgroup import read_lines
from worker.systemd.usage import CGROUP_ROOT

_KERNEL_THREAD = 0x00200000  # PF_KTHREAD of the kernel's include/linux/sched.h
_UNLIMITED = 1 << 62
"""cgroup v1 says "no limit" with the largest number of pages there is."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process at the moment of a look."""

    pid: int
    name: str
    """Program name as the kernel keeps it, at most 15 bytes, printable."""
    parent: int
    started: int
    """Clock ticks since boot."""
    ended: bool = False
    """A zombie: nothing runs any more, only its exit status is still to be fetched."""
    kernel: bool = False
    """A thread of the kernel."""


def parse_stat(text: str) -> Process:
    """``/proc/PID/stat``; the name in it may hold blanks and parentheses."""
    head, _, tail = text.rpartition(")")
    pid, _, name = head.partition(" (")
    rest = tail.split()
    return Process(
        pid=int(pid),
        name="".join(char if char.isprintable() else "?" for char in name),
        parent=int(rest[1]),
        started=int(rest[19]),
        ended=rest[0] in ("Z", "X", "x"),
        kernel=bool(int(rest[6]) & _KERNEL_THREAD),
    )


class Processes:
    """The processes that ``proc`` shows."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc

    def get(self, pid: int) -> Process | None:
        """None: there is no process of this PID, or none that we may see."""
        try:
            # not read as UTF-8: a name may be any bytes
            return parse_stat((self._proc / str(pid) / "stat").read_bytes().decode("latin-1"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return None

    def family(self, pid: int) -> list[Process]:
        """The process and all its descendants that still run, it first; empty if it does not.

        A process whose parent has ended is a child of PID 1 (or of a subreaper) from then on,
        and so no descendant.
        """
        children: dict[int, list[Process]] = {}
        for name in os.listdir(self._proc):  # noqa: PTH208 - no objects, as there are many
            if name.isascii() and name.isdigit() and (process := self.get(int(name))):
                children.setdefault(process.parent, []).append(process)
        first = self.get(pid)
        if first is None or first.ended:
            return []
        found, waiting = {first.pid: first}, [first]
        while waiting:
            for child in children.get(waiting.pop().pid, []):
                if child.pid not in found:
                    found[child.pid] = child
                    waiting.append(child)
        return [process for process in found.values() if not process.ended]

    def owner(self, pid: int) -> int:
        """The process that a thread belongs to; ``pid`` itself for a process or none at all."""
        for line in read_lines(f"{self._proc}/{pid}/status") or []:
            if line.startswith("Tgid:"):
                return int(line.split()[1])
        return pid

    def anonymous_bytes(self, pid: int) -> int:
        """Memory it holds that is not a copy of a file."""
        for line in read_lines(f"{self._proc}/{pid}/status") or []:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        return 0

    def is_apart(self, pid: int) -> bool:
        """It lives in another PID or cgroup namespace than we do, as in a container."""
        return any(
            mine is not None and theirs is not None and mine != theirs
            for mine, theirs in (
                (self._namespace("self", kind), self._namespace(str(pid), kind))
                for kind in ("pid", "cgroup")
            )
        )

    def cgroups(self, pid: int) -> dict[str, str]:
        """Its cgroup by controller; ``""`` is cgroup v2, ``name=systemd`` systemd's own on v1."""
        found = {}
        for line in read_lines(f"{self._proc}/{pid}/cgroup") or []:
            _, controllers, path = line.split(":", 2)
            found.update(dict.fromkeys(controllers.split(","), path))
        return found

    def unit(self, pid: int) -> str:
        """The service or scope it belongs to; empty if it is in none.

        The innermost: a unit of a user's manager lies in that manager's own unit.
        """
        cgroups = self.cgroups(pid)
        path = cgroups.get("name=systemd") or cgroups.get("", "")
        units = [part for part in path.split("/") if part.endswith((".service", ".scope"))]
        return units[-1] if units else ""

    def _namespace(self, process: str, kind: str) -> str | None:
        try:
            return str((self._proc / process / "ns" / kind).readlink())
        except OSError:  # gone, not ours to look at, or a kernel without it
            return None


@dataclass(frozen=True, slots=True)
class InForce:
    """The limits of one cgroup, from the kernel's own files; None where there is none."""

    cpu_percent: float | None = None
    memory_bytes: int | None = None
    swap_bytes: int | None = None


def limits_in_force(
    unit: str, cgroups: Mapping[str, str], root: Path = Path(CGROUP_ROOT)
) -> InForce:
    """The limits that a process whose ``cgroups`` are these has from the unit it is in.

    A controller that the unit has no cgroup in limits nothing.
    """

    def number(controller: str, *names: str) -> list[int]:
        """The numbers in these files; empty without the controller, or where one says "max"."""
        # hybrid: what v1 has, v2 has not
        path = cgroups.get(controller) or cgroups.get("", "")
        if unit not in path.split("/"):
            return []
        base = root / controller if controller in cgroups else root
        words = [
            word for name in names for line in read_lines(f"{base}{path}/{name}") or []
            for word in line.split()
        ]  # fmt: skip
        return (
            [int(word) for word in words] if all(w.isascii() and w.isdigit() for w in words) else []
        )

    quota = (
        number("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")
        if "cpu" in cgroups
        else number("cpu", "cpu.max")
    )
    memory = number("memory", "memory.limit_in_bytes" if "memory" in cgroups else "memory.max")
    swap = [] if "memory" in cgroups else number("memory", "memory.swap.max")
    return InForce(
        cpu_percent=100 * quota[0] / quota[1] if len(quota) == 2 and quota[1] else None,
        memory_bytes=memory[0] if memory and memory[0] < _UNLIMITED else None,
        swap_bytes=swap[0] if swap else None,
    )
