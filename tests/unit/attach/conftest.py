"""A few processes, and what looks at them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.attach.proc import Proc
from worker.systemd.processes import Processes


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    proc = Proc(tmp_path / "proc")
    proc.add(1, 0, name="systemd", cgroup="/init.scope")
    proc.add(10)
    proc.add(11, 10, name="a (b) c")
    proc.add(12, 11)
    proc.add(13)
    return proc


@pytest.fixture
def look(proc: Proc) -> Processes:
    return Processes(proc.folder)
