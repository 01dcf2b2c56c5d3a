"""The processes in a unit's cgroup, and those that are there after its main process has ended.

A unit with RemainAfterExit= is "exited" as soon as its main process has ended well; other
processes of it live on in its cgroup until the unit is stopped. systemd removes a cgroup that has
no process left, so normally there is nothing to be found.
"""

from __future__ import annotations

import os
from pathlib import Path

from worker.systemd.usage import CGROUP_ROOT

_MOST_CGROUPS = 1000
"""Looked at below one unit. Only jobs of a user's manager can make any."""


def survivors(control_group: str, root: Path = Path(CGROUP_ROOT)) -> list[int]:
    """PIDs of the processes in a unit's cgroup and below it; empty where it is gone.

    ``control_group`` is the unit's ``ControlGroup``, as it was while the unit ran. To be asked
    when the main process has ended; before, it is among them. A process that has ended, waited
    for or not, is in no cgroup any more. One whose first thread only has ended still is.
    """
    if not control_group.strip("/"):  # the root: every process of the machine is below it
        return []
    pids: list[int] = []
    waiting = [f"{_tree(root)}{control_group}"]
    for _ in range(_MOST_CGROUPS):
        if not waiting:
            break
        folder = waiting.pop()
        try:
            with open(f"{folder}/cgroup.procs", "rb") as file:  # noqa: PTH123 - a tenth of the time
                words = file.read().split()
            with os.scandir(folder) as entries:
                waiting += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:  # removed, which means empty; or threaded, then its parent has them all
            continue
        pids += [int(word) for word in words if word != b"0"]  # 0: not in our PID namespace
    return pids


def _tree(root: Path) -> str:
    """Where systemd keeps the processes of units: cgroup v2, or its own tree of v1 and hybrid."""
    return str(root if (root / "cgroup.controllers").exists() else root / "systemd")
