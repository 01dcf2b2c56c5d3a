"""Which limits hold on this machine: set on a short unit, and read back from the kernel.

systemd takes every limit, also where it cannot enforce it: a user's manager without the cgroup
controllers, a container, a kernel built without. So a unit like those of jobs is started, and what
counts is what stands in the files of its cgroup.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from worker.errors import SystemdError, WorkerError
from worker.systemd.cgroup import read_lines
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher
from worker.systemd.names import object_path, slice_name
from worker.systemd.processes import Processes, limits_in_force
from worker.systemd.usage import CGROUP_ROOT

logger = logging.getLogger(__name__)

_PREFIX = "ffmpeg-limits-check-"
"""No unit of a job is called so, see names.py."""
_SLEEP_SEC = 30
_PATIENCE_SEC = 20.0
_CPU_PERCENT = 50
_MEMORY_BYTES = 64 << 20
_TASKS = 64
_WEIGHT = 150
_LIMITS = UnitLimits(
    cpu_percent=_CPU_PERCENT,
    memory_bytes=_MEMORY_BYTES,
    tasks_max=_TASKS,
    cpu_weight=_WEIGHT,
    io_weight=_WEIGHT,
)
_V1_WEIGHT = _WEIGHT * 1024 // 100
"""cgroup v1 has 1024 where v2 has 100."""


class Limit(StrEnum):
    CPU = "cpu"
    MEMORY = "memory"
    SWAP = "swap"
    TASKS = "tasks"
    CPU_WEIGHT = "cpu_weight"
    IO_WEIGHT = "io_weight"

    @property
    def shown(self) -> str:
        return _SHOWN.get(self, self.value)

    @property
    def is_weight(self) -> bool:
        """It shares out what is contended; it is no ceiling."""
        return self in (Limit.CPU_WEIGHT, Limit.IO_WEIGHT)


_SHOWN = {Limit.CPU: "CPU", Limit.CPU_WEIGHT: "CPU weight", Limit.IO_WEIGHT: "I/O weight"}
_CONTROLLERS = {
    Limit.CPU: {"cpu"},
    Limit.MEMORY: {"memory"},
    Limit.SWAP: {"memory"},
    Limit.TASKS: {"pids"},
    Limit.CPU_WEIGHT: {"cpu"},
    Limit.IO_WEIGHT: {"io", "blkio"},  # v2, v1
}
_NO_USER_V1 = (
    "on cgroup v1 a user's service manager can limit only run time and file size; run the worker"
    " without --user, or boot with cgroup v2 (systemd.unified_cgroup_hierarchy=1 on the kernel's"
    " command line)"
)
_NOT_DELEGATED = (
    "the user's service manager was not given the controllers; as root: systemctl edit"
    " user@.service, with [Service] Delegate=cpu cpuset io memory pids, then systemctl restart"
    " user@UID.service, which ends all that the user runs"
)
_NO_KERNEL = (
    "kernel or container do not offer it to systemd; see /proc/cgroups, and cgroup_disable= and"
    " cgroup_enable= in /proc/cmdline"
)
_SWAPS = (
    "systemd cannot forbid swap here (it takes cgroup v2 and a kernel that accounts for swap): a"
    " job over its memory limit slows the machine down before it ends; swapoff -a prevents that"
)
_NO_SHARING_DISK = (
    "no disk shares by weight, so queues and priorities are the same to it;"
    " echo bfq > /sys/block/DISK/queue/scheduler changes that"
)


@dataclass(frozen=True, slots=True)
class Enforcement:
    """What holds of the limits that were set, and why the rest does not."""

    holds: tuple[Limit, ...]
    missing: Mapping[Limit, str]
    """With the reason and what to do."""
    place: str
    """``cgroup v2, system manager`` and the like."""

    @property
    def label(self) -> str:
        """For the registration: the limits that hold, ``cpu,memory,tasks``."""
        return ",".join(limit for limit in self.holds if not limit.is_weight)

    def log(self) -> None:
        """One line of what holds; one for each reason of what does not, with what to do.

        Weights alone are no warning: without them only the order among jobs is lost.
        """
        limits = [limit.shown for limit in self.holds if not limit.is_weight]
        weights = [limit.shown for limit in self.holds if limit.is_weight]
        logger.info(
            "limits that the kernel enforces here: %s (%s)%s",
            ", ".join(limits) or "none", self.place, "".join(f"; {weight}" for weight in weights),
        )  # fmt: skip
        for reason in dict.fromkeys(self.missing.values()):
            missing = [limit for limit, why in self.missing.items() if why == reason]
            harmless = all(limit.is_weight for limit in missing)
            logger.log(
                logging.INFO if harmless else logging.WARNING,
                "NOT enforced here: %s: %s",
                ", ".join(limit.shown for limit in missing), reason,
            )  # fmt: skip


async def check(launcher: Launcher, *, user: bool) -> Enforcement | None:
    """Find out and log what holds; None, with a warning, where that cannot be found out.

    Takes one short unit, which is gone afterwards. ``user``: the launcher's is a user's manager.
    """
    try:
        async with asyncio.timeout(_PATIENCE_SEC):
            found = await _try(launcher, user=user)
    except TimeoutError:
        logger.warning("cannot tell which limits hold: no answer in %g s", _PATIENCE_SEC)
        return None
    except Exception as error:  # what is told here is not worth a start that fails
        expected = isinstance(error, (WorkerError, OSError))
        logger.warning("cannot tell which limits hold: %s", error, exc_info=not expected)
        return None
    found.log()
    return found


async def _try(launcher: Launcher, *, user: bool) -> Enforcement:
    program = shutil.which("sleep")
    if program is None:
        raise SystemdError("there is no sleep(1) in PATH")
    unit = await launcher.start(
        Launch(
            unit=f"{_PREFIX}{secrets.token_hex(4)}.service",
            description="which limits hold (ffmpeg-worker)",
            argv=(program, str(_SLEEP_SEC)),
            slice=slice_name("default"),
            limits=_LIMITS,
            stdout=Path("/dev/null"),
            stop_timeout_sec=1.0,
        )
    )
    try:
        pid = unit.state.main_pid or await launcher.bus.get(
            object_path(unit.name), "Service", "MainPID"
        )
        cgroups = Processes().cgroups(pid) if isinstance(pid, int) and pid else {}
        if not cgroups:
            raise SystemdError(f"{unit.name} ended early: journalctl -u {unit.name} says more")
        found = examine(unit.name, cgroups, user=user)
    finally:
        await unit.reap()
    await _clear_remains(launcher)
    return found


async def _clear_remains(launcher: Launcher) -> None:
    """Units of agents that were killed while they looked."""
    (rows,) = await launcher.bus.call("ListUnitsByPatterns", "asas", [[], [f"{_PREFIX}*.service"]])
    assert isinstance(rows, list)
    for row in rows:
        if row[4] in ("exited", "failed"):  # what still sleeps may be another agent's
            # that other one may be reaping it, too
            with contextlib.suppress(SystemdError):
                await launcher.stop_and_reap(row[0])


def examine(
    unit: str,
    cgroups: Mapping[str, str],
    *,
    user: bool,
    root: Path = Path(CGROUP_ROOT),
    proc: Path = Path("/proc"),
    sys_block: Path = Path("/sys/block"),
) -> Enforcement:
    """What holds for a process of ``unit``, whose ``cgroups`` are these, of the limits above."""
    v2 = (root / "cgroup.controllers").exists()
    read = _reader(unit, cgroups, root)
    in_force = limits_in_force(unit, cgroups, root)
    swaps = len(read_lines(f"{proc}/swaps") or []) > 1  # the first line is a heading
    held = {
        Limit.CPU: _near(in_force.cpu_percent, _CPU_PERCENT),
        Limit.MEMORY: in_force.memory_bytes == _MEMORY_BYTES,
        Limit.SWAP: in_force.swap_bytes == 0,
        Limit.TASKS: read("pids", "pids.max") == [str(_TASKS)],
        Limit.CPU_WEIGHT: read("cpu", "cpu.weight") == [str(_WEIGHT)]
        or read("cpu", "cpu.shares") == [str(_V1_WEIGHT)],
        Limit.IO_WEIGHT: _has_io_weight(read) and _shares_by_weight(root, sys_block),
    }
    if not held[Limit.SWAP] and not swaps:
        del held[Limit.SWAP]  # there is nothing to forbid
    given = {name for name, path in cgroups.items() if unit in path.split("/")}
    if v2:
        given = set(read("", "cgroup.controllers"))
    return Enforcement(
        holds=tuple(limit for limit in Limit if held.get(limit)),
        missing={
            limit: _reason(limit, given=given, user=user, v2=v2)
            for limit in Limit
            if held.get(limit) is False
        },
        place=f"cgroup {'v2' if v2 else 'v1'}, {'user' if user else 'system'} manager",
    )


def _reason(limit: Limit, *, given: set[str], user: bool, v2: bool) -> str:
    if not given & _CONTROLLERS[limit]:
        if not user:
            return _NO_KERNEL
        return _NOT_DELEGATED if v2 else _NO_USER_V1
    return {Limit.SWAP: _SWAPS, Limit.IO_WEIGHT: _NO_SHARING_DISK}.get(limit, _NO_KERNEL)


def _near(value: float | None, wanted: float) -> bool:
    return value is not None and abs(value - wanted) < 1


Reader = Callable[[str, str], list[str]]


def _reader(unit: str, cgroups: Mapping[str, str], root: Path) -> Reader:
    """Reads the words in a file of the unit's cgroup; none without the file or the cgroup."""

    def read(controller: str, name: str) -> list[str]:
        v1 = bool(controller) and controller in cgroups
        path = cgroups.get(controller if v1 else "", "")
        if unit not in path.split("/"):
            return []
        lines = read_lines(f"{root / controller if v1 else root}{path}/{name}") or []
        return [word for line in lines for word in line.split()]

    return read


def _has_io_weight(read: Reader) -> bool:
    """A weight above the default stands there; which one depends on the scale of each file."""
    for controller, name, default in (
        ("io", "io.weight", 100),
        ("io", "io.bfq.weight", 100),
        ("blkio", "blkio.weight", 500),
        ("blkio", "blkio.bfq.weight", 100),
    ):
        words = read(controller, name)
        if words[:1] == ["default"]:
            words = words[1:]
        if words and words[0].isdecimal() and int(words[0]) > default:
            return True
    return False


def _shares_by_weight(root: Path, sys_block: Path) -> bool:
    """Some disk heeds weights: by its scheduler, or by the kernel's cost model (io.cost.qos)."""
    schedulers = (read_lines(str(path)) or [] for path in sys_block.glob("*/queue/scheduler"))
    return any("[bfq]" in line or "[cfq]" in line for lines in schedulers for line in lines) or any(
        "enable=1" in line.split() for line in read_lines(str(root / "io.cost.qos")) or []
    )
