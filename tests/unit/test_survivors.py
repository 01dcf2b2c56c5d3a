"""Who is left in a unit's cgroup, where each layout of cgroups has it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from worker.systemd.survivors import survivors

GROUP = "/ffmpeg.slice/ffmpeg-default.slice/ffmpeg-job-1.service"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(params=["v2", "hybrid", "v1"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A cgroup file system in which the unit has no cgroup yet."""
    if request.param == "v2":
        write(tmp_path / "cgroup.controllers", "cpu memory\n")
        write(tmp_path / "cgroup.procs", "1\n")
    else:
        write(tmp_path / "systemd/cgroup.procs", "1\n")
        write(tmp_path / "memory/cgroup.procs", "1\n")
    if request.param == "hybrid":
        write(tmp_path / "unified/cgroup.controllers", "")
    return tmp_path


def tree(root: Path) -> Path:
    own = root / "systemd"
    return (own if own.exists() else root) / GROUP[1:]


def test_somebody_is_left(root: Path) -> None:
    write(tree(root) / "cgroup.procs", "12\n345\n")
    assert survivors(GROUP, root) == [12, 345]


def test_nobody_is_left(root: Path) -> None:
    assert survivors(GROUP, root) == []
    write(tree(root) / "cgroup.procs", "")
    assert survivors(GROUP, root) == []


def test_cgroups_that_a_job_has_made_below(root: Path) -> None:
    write(tree(root) / "cgroup.procs", "")
    write(tree(root) / "a/cgroup.procs", "")
    write(tree(root) / "a/b/cgroup.procs", "7\n")
    (tree(root) / "link").symlink_to(tree(root))
    assert survivors(GROUP, root) == [7]


def test_a_process_that_we_have_no_number_for(root: Path) -> None:
    write(tree(root) / "cgroup.procs", "0\n7\n")
    assert survivors(GROUP, root) == [7]


@pytest.mark.parametrize("group", ["", "/"])
def test_no_unit_is_not_the_whole_machine(root: Path, group: str) -> None:
    assert survivors(group, root) == []


def test_a_cgroup_that_is_gone_costs_one_look(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []
    monkeypatch.setattr(os, "scandir", looks.append)
    assert survivors(GROUP, root) == []
    assert looks == []
