"""Processes that outlive the main process of their unit."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.slowness import SLOWNESS
from tests.system.commands import until
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher
from worker.systemd.survivors import survivors
from worker.systemd.unit import Unit

PYTHON = shutil.which("python3") or sys.executable
DAEMON = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
reading, writing = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(writing, str(os.getpid()).encode())
        os.close(writing)
        while True:
            signal.pause()
    os._exit(0)
print(os.read(reading, 20).decode(), flush=True)
"""
"""Ends well, and leaves one behind that has a session of its own and is told by its number."""
ZOMBIE = """
import os, signal
pid = os.fork()
if pid == 0:
    os._exit(0)
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
print(pid, flush=True)
signal.pause()
"""


async def started(launcher: Launcher, tmp_path: Path, program: str) -> Unit:
    return await launcher.start(
        Launch(
            unit="ffmpeg-job-one.service",
            description="a job that leaves something behind",
            argv=(PYTHON, "-c", program),
            slice="ffmpeg-default.slice",
            limits=UnitLimits(),
            stdout=tmp_path / "out",
            stop_timeout_sec=1 * SLOWNESS,
        )
    )


async def test_a_daemon_is_found_and_ended_with_the_unit(
    launcher: Launcher, tmp_path: Path
) -> None:
    unit = await started(launcher, tmp_path, DAEMON)
    state = await unit.finished()
    assert (state.result, state.exec_main_code, state.exec_main_status) == ("success", 1, 0)
    left = survivors(state.control_group)
    assert left == [int((tmp_path / "out").read_text())]
    await unit.reap()
    assert survivors(state.control_group) == []
    with pytest.raises(ProcessLookupError):
        os.kill(left[0], 0)


async def test_a_process_that_ended_does_not_count(launcher: Launcher, tmp_path: Path) -> None:
    unit = await started(launcher, tmp_path, ZOMBIE)
    await until(lambda: (tmp_path / "out").read_text().endswith("\n"))
    text = (tmp_path / "out").read_text().strip()
    assert Path(f"/proc/{text}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    assert survivors(unit.state.control_group) == [unit.state.main_pid]
    await unit.stop()
    assert survivors(unit.state.control_group) == []
    await unit.reap()


async def test_most_leave_nothing(launcher: Launcher, tmp_path: Path) -> None:
    unit = await started(launcher, tmp_path, "")
    assert survivors((await unit.finished()).control_group) == []
    await unit.reap()
