"""Reading a unit's counters while it runs: cgroup v1, hybrid and v2 behind one interface.

A cgroup disappears the moment its last process ends, so every file may be gone at any time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from worker.systemd.usage import CGROUP_ROOT, Usage, parse_file

_GONE = (errno.ENOENT, errno.ENODEV, errno.ESRCH)
_MOST_BYTES = 64 * 1024


class CgroupMeter:
    """Knows where this machine keeps the counters of a cgroup.

    Hybrid means: the controllers are on v1, and an empty v2 tree lies at ``unified``. That tree
    counts CPU time even where ``cpu`` and ``cpuacct`` are mounted apart; systemd makes a unit's
    cgroup in the ``cpuacct`` tree only where both are one.
    """

    def __init__(self, root: Path = Path(CGROUP_ROOT), proc: Path = Path("/proc")) -> None:
        self._proc = proc
        # The first line of the record is lost where the program's last line has no end. So the
        # first file is one whose first line is not needed.
        v2 = (root / "cgroup.controllers").exists()
        if v2:
            names = ["memory.events", "memory.peak", "cpu.stat", "io.stat", "pids.events"]
            self._files = [(str(root), name) for name in names]
        else:
            self._files = [
                (str(root / "memory"), "memory.oom_control"),
                (str(root / "memory"), "memory.max_usage_in_bytes"),
                (str(root / "unified"), "cpu.stat"),
                (str(root / "cpuacct"), "cpuacct.usage"),
                (str(root / "memory"), "memory.failcnt"),
                (str(root / "blkio"), "blkio.throttle.io_service_bytes_recursive"),
                (str(root / "pids"), "pids.events"),
            ]
        # memory.peak came with Linux 5.19; before, the largest sample has to do.
        self._live = [*self._files, *([(str(root), "memory.current")] if v2 else [])]

    def record_files(self, control_group: str) -> Sequence[str]:
        """The counter files of a cgroup that the usage record is made of."""
        return [f"{base}{control_group}/{name}" for base, name in self._files]

    def sample(self, control_group: str, pid: int = 0) -> Usage:
        """The counters as they stand now, with those of process ``pid``; empty when gone."""
        result = Usage()
        for base, name in self._live if control_group else ():
            path = f"{base}{control_group}/{name}"
            if lines := read_lines(path):
                result = result.merged(parse_file(path, lines))
        if pid:
            path = f"{self._proc}/{pid}/io"
            if lines := read_lines(path):
                result = result.merged(parse_file(path, lines))
        return result


def read_lines(path: str) -> list[str] | None:
    """The lines of a kernel file; None if it, or what it describes, is gone or not ours to see."""
    try:
        # Plain system calls: this is read for every unit, again and again.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(file, _MOST_BYTES).decode("ascii", "replace").splitlines()
        finally:
            os.close(file)
    except PermissionError:
        return None
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
