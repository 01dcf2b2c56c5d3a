"""Fixtures of the tests on a real systemd, which is that of the test bed."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests import installing
from tests.system.commands import no_cgroups, run
from tests.system.foreign import UNITS, Foreign, no_units, units
from tests.system.launching import Jobs, close_clean
from worker.systemd.launcher import Launcher
from worker.systemd.names import JOB_UNITS


@pytest.fixture(scope="session", autouse=True)
def bed() -> None:
    assert os.environ.get("FFMPEG_WORKER_BED") == "1", (
        "these tests start system units, so they only run in the test bed: "
        "tests/bed/bed.py run -- .venv/bin/python -m pytest tests/system"
    )


@pytest.fixture
async def launcher() -> AsyncIterator[Launcher]:
    """Connected, and when the test is over: no unit and no cgroup of a job is left."""
    assert await run("systemctl", "list-units", "--all", "--plain", "-q", JOB_UNITS) == ""
    launcher = Launcher()
    await launcher.connect()
    yield launcher
    await close_clean(launcher)
    await no_cgroups(JOB_UNITS)


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path)


@pytest.fixture
async def foreign() -> AsyncIterator[Foreign]:
    """When the test is over, its processes are ended, and no unit and no cgroup is left."""
    assert await units() == []
    foreign = Foreign()
    yield foreign
    await foreign.end()
    await no_units()
    await no_cgroups(*UNITS)


@pytest.fixture(scope="module")
def first_install() -> Iterator[str]:
    """The output of an install on a machine that had none; removed at the end."""
    with installing.first_install() as said:
        yield said


@pytest.fixture
def with_a_master() -> Iterator[None]:
    with installing.master_in_config():
        yield
