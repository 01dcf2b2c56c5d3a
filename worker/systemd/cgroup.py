"""Reading a unit's counters while it runs: cgroup v1, hybrid and v2 behind one interface.

A cgroup disappears the moment its last process ends, so every file may be gone at any time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from worker.systemd.usage import CGROUP_ROOT, Usage, parse_files

# The last one: before Linux 5.14 a kernel with psi=0 has the pressure files, but no figures.
_GONE = (errno.ENOENT, errno.ENODEV, errno.ESRCH, errno.EOPNOTSUPP)
_FLAGS = os.O_RDONLY | os.O_CLOEXEC
_MOST_BYTES = 64 * 1024


class CgroupMeter:
    """Knows where this machine keeps the counters of a cgroup.

    Hybrid means: the controllers are on v1, and a v2 tree without any lies at ``unified``. That
    tree has the CPU time even where ``cpu`` and ``cpuacct`` are mounted apart (systemd makes a
    unit's cgroup in the ``cpuacct`` tree only where both are one), and the stalls.
    """

    def __init__(self, root: Path = Path(CGROUP_ROOT), proc: Path = Path("/proc")) -> None:
        self._proc = proc
        # The first line of the record is lost where the program's last line has no end. So the
        # first file is one whose first line is not needed.
        if (root / "cgroup.controllers").exists():
            v2 = root
            names = ["memory.events", "memory.peak", "cpu.stat", "io.stat", "pids.events"]
            files = [(root, name) for name in names]
        else:
            v2 = root / "unified"
            hybrid = (v2 / "cgroup.controllers").exists()
            files = [
                (root / "memory", "memory.oom_control"),
                (root / "memory", "memory.max_usage_in_bytes"),
                (v2, "cpu.stat") if hybrid else (root / "cpuacct", "cpuacct.usage"),
                (root / "memory", "memory.failcnt"),
                (root / "blkio", "blkio.throttle.io_service_bytes_recursive"),
                (root / "pids", "pids.events"),
            ]
        # Only v2 trees have these, and only where the kernel measures pressure at all.
        if v2.exists() and (proc / "pressure").exists():
            files += [(v2, f"{what}.pressure") for what in ("cpu", "memory", "io")]
        self._files = [(str(base), name) for base, name in files]

    def record_files(self, control_group: str) -> Sequence[str]:
        """The counter files of a cgroup that the usage record is made of."""
        return [f"{base}{control_group}/{name}" for base, name in self._files]

    def sample(self, control_group: str, pid: int = 0) -> Usage:
        """The counters as they stand now, with those of process ``pid``; empty when gone."""
        return parse_files(self._texts(control_group, pid))

    def _texts(self, control_group: str, pid: int) -> Iterator[tuple[str, str]]:
        for base, name in self._files if control_group else ():
            text = read_text(f"{base}{control_group}/{name}")
            if text is None and name == "memory.peak":
                # It came with Linux 5.19; before, the largest sample has to do.
                name = "memory.current"
                text = read_text(f"{base}{control_group}/{name}")
            if text:
                yield name, text
        if pid and (text := read_text(f"{self._proc}/{pid}/io")):
            yield "io", text


def read_text(path: str) -> str | None:
    """A kernel file; None if it, or what it describes, is gone or not ours to see."""
    try:
        # Plain system calls: this is read for every unit, again and again.
        file = os.open(path, _FLAGS)
        try:
            return os.read(file, _MOST_BYTES).decode("ascii", "replace")
        finally:
            os.close(file)
    except PermissionError:
        return None
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise


def read_lines(path: str) -> list[str] | None:
    """The lines of a kernel file; None as for read_text."""
    text = read_text(path)
    return None if text is None else text.splitlines()
